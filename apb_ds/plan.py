"""Integer planning of one request: blocks, anchor, rounds, and who serves whom. Pure functions, no torch.

Every rank computes the same `Plan` from config, document length, query length and world size, so every rank knows the
length of every message before anything is sent.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from apb_ds.config import (
    ANCHOR_IS_BLOCK,
    DEFAULT_COMPRESSION_RATIO,
    MAX_DEFAULT_ANCHOR_LENGTH,
    APBConfig,
    BlockSettings,
    check_integer,
)

Span = tuple[int, int]  # [start, stop)

# Tokens of a model forward that keep a GPU busy; shorter blocks are computed several at a time.
FORWARD_TOKENS = 16_384
# Two hosts share a forward only up to so many tokens together, since an MLP's intermediate states grow with them.
MAX_SHARED_FORWARD_TOKENS = 65_536


def split_evenly(num_tokens: int, parts: int) -> tuple[Span, ...]:
    """Cut ``[0, num_tokens)`` into contiguous spans ``[floor(i*n/parts), floor((i+1)*n/parts))``; some may be empty."""
    return tuple((i * num_tokens // parts, (i + 1) * num_tokens // parts) for i in range(parts))


Round = tuple[tuple[int, ...], ...]  # by rank, its hosts in document order


def schedule_rounds(
    hosts: int, world_size: int, schedule: str, per_round: int = 1, empty: frozenset[int] = frozenset()
) -> tuple[Round, ...]:
    """Return ``rounds[k][r]``, the hosts that rank r serves in round k.

    In turns, ``natural`` gives rank r the hosts r, r+W, ...; ``zigzag`` mirrors every odd turn, so that a rank with an
    early host (little to attend to) gets a late one next. Turns in which every host is among the `empty` ones, which
    have no tokens, are left out. A round is `per_round` turns; the last round may have fewer.
    """
    turns = []
    for first in range(0, hosts, world_size):
        served = tuple(range(first, first + world_size))
        mirrored = schedule == "zigzag" and (first // world_size) % 2 == 1
        if not empty.issuperset(served):
            turns.append(served[::-1] if mirrored else served)
    chunks = [turns[first : first + per_round] for first in range(0, len(turns), per_round)]
    return tuple(tuple(zip(*chunk, strict=True)) for chunk in chunks)


def default_hosts_per_round(block_length: int, world_size: int, forward_tokens: int | None) -> int:
    """Return how many blocks a rank computes in one forward: as many as have `forward_tokens` tokens together.

    Several ranks take at least two, up to `MAX_SHARED_FORWARD_TOKENS`: they wait for each other in every layer, and the
    late host of a zigzag pair has more to attend to than the early one. None means one, for CPUs, where neither
    matters.
    """
    if forward_tokens is None:
        return 1
    balances = world_size > 1 and 2 * block_length <= MAX_SHARED_FORWARD_TOKENS
    return max(forward_tokens // block_length, 2 if balances else 1)


def check_ranks(config: APBConfig, world_size: int) -> None:
    """Raise ValueError if the method cannot run on so many ranks."""
    settings = config.settings
    if settings.method == "dense" and world_size > 1:
        raise ValueError(
            f"method=dense runs on one rank, and there are {world_size}; use method=ring or method=ulysses for exact "
            "attention over several."
        )
    if isinstance(settings, BlockSettings):
        check_world_size(settings.hosts, world_size)


def check_world_size(hosts: int, world_size: int) -> None:
    """Raise ValueError unless the hosts divide evenly over the ranks."""
    if hosts % world_size:
        raise ValueError(
            f"hosts={hosts} must be a multiple of the number of ranks ({world_size}), so that all ranks serve "
            f"equally many; use hosts={math.ceil(hosts / world_size) * world_size} or another number of ranks."
        )


@dataclass(frozen=True)
class Plan:
    """How one request is split. All lengths in tokens.

    The exact methods have plans, too: ``dense`` one block; ``ring`` two blocks a rank, r and 2W-1-r, which balances the
    work; ``ulysses`` one block a rank, padded so that all ranks feed equally many tokens.

    Attributes
    ----------
    num_tokens : length n of the document
    world_size : number W of ranks
    anchor_length : l_a, 0 for no anchor
    anchor_query_length : how many of the anchor's tokens are the query's
    query_position : document tokens before the query in the anchor
    passing_length : l_p, the most tokens a host passes
    exact : whether this request runs as exact causal attention
    shard_anchor : whether each rank computes only its share of the anchor
    blocks : document span of each host
    rounds : ``rounds[k][r]`` are the hosts of rank r in round k, in document order, equally many for every rank; every
        round has tokens on some rank
    method : as in `APBConfig`, with ``apb`` for ``star``
    """

    num_tokens: int
    world_size: int
    anchor_length: int
    anchor_query_length: int
    query_position: int
    passing_length: int
    exact: bool
    shard_anchor: bool
    blocks: tuple[Span, ...]
    rounds: tuple[Round, ...]
    method: str = "apb"

    @property
    def hosts(self) -> int:
        return len(self.blocks)

    @property
    def eligible_start(self) -> int:
        """First document position that the anchor does not hold: only tokens from here on are passed."""
        return self.anchor_length - self.anchor_query_length

    @property
    def anchor_query_span(self) -> Span:
        """Where the query sits in the anchor."""
        return self.query_position, self.query_position + self.anchor_query_length

    @cached_property
    def kept_lengths(self) -> tuple[int, ...]:
        """Tokens that each host passes: l_p, or fewer where fewer are eligible."""
        return tuple(min(self.passing_length, self.num_eligible(host)) for host in range(self.hosts))

    @cached_property
    def kept_offsets(self) -> tuple[int, ...]:
        """Length of the passing block of each host: ``kept_offsets[h]`` tokens come from hosts before h."""
        offsets = [0]
        for length in self.kept_lengths:
            offsets.append(offsets[-1] + length)
        return tuple(offsets)

    def num_seen(self, host: int) -> int:
        """Tokens that the host's block sees besides its own: anchor and passing block; 0 for the first host."""
        return self.anchor_length + self.kept_offsets[host] if host > 0 else 0

    def block_length(self, host: int) -> int:
        start, stop = self.blocks[host]
        return stop - start

    def num_eligible(self, host: int) -> int:
        """Tokens of the host's block that the anchor does not hold: the last ones."""
        start, stop = self.blocks[host]
        return max(0, stop - max(start, self.eligible_start))

    def is_passed_on(self, host: int) -> bool:
        """Whether a later host attends to what this one keeps."""
        return host < self.hosts - 1 and self.kept_lengths[host] > 0

    def is_scored(self, host: int) -> bool:
        """Whether the host's tokens need scores: not if nothing, or everything eligible, is passed on."""
        return self.is_passed_on(host) and self.kept_lengths[host] < self.num_eligible(host)

    def served(self, rank: int, round_index: int) -> tuple[int, ...]:
        """Hosts whose blocks are in the rank's forward of this round, in document order."""
        return self.rounds[round_index][rank]

    def padding_length(self, rank: int) -> int:
        """Tokens behind the document's end in the rank's forward: ulysses needs equally many tokens on every rank."""
        if self.method != "ulysses":
            return 0
        return math.ceil(self.num_tokens / self.world_size) - self.block_length(rank)

    def hosts_of(self, rank: int) -> tuple[int, ...]:
        """Hosts that the rank serves, in the order of the rounds; without those whose turn has no tokens."""
        return tuple(host for index in range(len(self.rounds)) for host in self.served(rank, index))

    def shard_length(self, rank: int) -> int:
        """Document tokens whose keys and values the rank caches."""
        return sum(self.block_length(host) for host in self.hosts_of(rank))

    @property
    def shard_lengths(self) -> tuple[int, ...]:
        """`shard_length` of every rank."""
        return tuple(self.shard_length(rank) for rank in range(self.world_size))

    def anchor_share(self, rank: int, round_index: int) -> Span:
        """Anchor span that the rank computes in this round: in the first its share, or all of it if not sharded."""
        if round_index > 0 or self.anchor_length == 0:
            return 0, 0
        if not self.shard_anchor:
            return 0, self.anchor_length
        return split_evenly(self.anchor_length, self.world_size)[rank]

    def num_forward_tokens(self, rank: int, round_index: int) -> int:
        """Tokens in the model forward of this rank and round; 0 where it has nothing to do."""
        start, stop = self.anchor_share(rank, round_index)
        blocks = sum(self.block_length(host) for host in self.served(rank, round_index))
        return stop - start + blocks + self.padding_length(rank)


def plan_request(
    config: APBConfig, num_tokens: int, query_length: int, world_size: int = 1, forward_tokens: int | None = None
) -> Plan:
    """Plan a request of `num_tokens` document tokens.

    Parameters
    ----------
    query_length : int
        Tokens of the query if it is known at prefill, else 0. They go into the anchor unless the config excludes them.
    world_size : int
        Number of ranks.
    forward_tokens : int, optional
        Tokens that a forward should have, where `config` does not set `hosts_per_round`; see
        `default_hosts_per_round`.

    Raises
    ------
    ValueError
        If the document is empty, the hosts do not divide over the ranks, or the anchor cannot hold the query.
    """
    check_integer("document length", num_tokens, 1)
    check_integer("query length", query_length, 0)
    check_ranks(config, world_size)
    settings = config.settings
    if not isinstance(settings, BlockSettings):
        return _plan_exact(settings.method, num_tokens, world_size)
    hosts = settings.hosts
    blocks = split_evenly(num_tokens, hosts)
    block_length = math.ceil(num_tokens / hosts)
    embedded = query_length if settings.query_in_anchor else 0
    anchor_length = _anchor_length(settings, blocks[0][1], block_length, embedded)
    exact = hosts == 1 or anchor_length > block_length
    if exact:
        anchor_length, embedded, passing_length = 0, 0, block_length
    else:
        passing_length = _passing_length(settings, block_length)
    if anchor_length == 0:
        embedded = 0
    needed = settings.query_position + embedded if embedded else 0
    if anchor_length < needed:
        raise ValueError(
            f"anchor_length={anchor_length} cannot hold the query: query_position={settings.query_position} plus "
            f"{embedded} query tokens need {needed}; raise anchor_length, shorten the query, or set "
            "query_in_anchor=false."
        )
    per_round = settings.hosts_per_round or default_hosts_per_round(block_length, world_size, forward_tokens)
    empty = frozenset(host for host, (start, stop) in enumerate(blocks) if start == stop)
    return Plan(
        num_tokens=num_tokens,
        world_size=world_size,
        anchor_length=anchor_length,
        anchor_query_length=embedded,
        query_position=settings.query_position,
        passing_length=passing_length,
        exact=exact,
        shard_anchor=settings.shard_anchor,
        blocks=blocks,
        rounds=schedule_rounds(hosts, world_size, settings.schedule, per_round, empty),
    )


def _plan_exact(method: str, num_tokens: int, world_size: int) -> Plan:
    blocks: tuple[Span, ...]
    if method == "ulysses":
        longest = math.ceil(num_tokens / world_size)
        starts = [min(rank * longest, num_tokens) for rank in range(world_size + 1)]
        blocks = tuple(itertools.pairwise(starts))
    else:
        blocks = split_evenly(num_tokens, 2 * world_size if method == "ring" else 1)
    # Each rank of a ring has an early and a late block, which balances the work.
    (round_,) = schedule_rounds(len(blocks), world_size, "zigzag", per_round=2)
    return Plan(
        num_tokens=num_tokens,
        world_size=world_size,
        anchor_length=0,
        anchor_query_length=0,
        query_position=0,
        passing_length=0,
        exact=True,
        shard_anchor=False,
        blocks=blocks,
        rounds=(round_,),
        method=method,
    )


def _anchor_length(settings: BlockSettings, first_block_length: int, block_length: int, embedded: int) -> int:
    if settings.anchor_length is None:
        needed = settings.query_position + embedded if embedded else 0
        return max(min(math.ceil(block_length / 4), MAX_DEFAULT_ANCHOR_LENGTH), needed)
    if settings.anchor_length == ANCHOR_IS_BLOCK:
        return first_block_length
    return int(settings.anchor_length)


def _passing_length(settings: BlockSettings, block_length: int) -> int:
    if settings.passing_length is not None:
        return settings.passing_length
    return math.ceil(block_length / (settings.compression_ratio or DEFAULT_COMPRESSION_RATIO))
