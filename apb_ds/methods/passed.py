"""What blocks see besides their own tokens, in one layer: the anchor and the compressed blocks before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from apb_ds.cache import ShardedCacheLayer
from apb_ds.compressors.base import BlockStates, Compressor, gather
from apb_ds.ops import profiling
from apb_ds.ops.selection import copy_pair
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan, Round, Span, split_evenly

Arrival = Callable[[], None]  # waits for what was sent and puts it where the attention reads it
# Index in the round, host and states of each of a rank's blocks that passes something on.
PassingBlocks = Iterator[tuple[int, int, BlockStates]]


def nothing_to_wait_for() -> None:
    """The `Arrival` where nothing was sent."""


class PassedStates:
    """Keys and values that blocks see besides their own, in one layer: ``[anchor | C_0 | C_1 | ...]``.

    They are in document order, so what a host sees are the first tokens: the anchor, then each compressed block before
    its own.

    Parameters
    ----------
    plan : how the request is split
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.anchor_queries: Tensor | None = None

    def start_anchor(self, group: SequenceGroup, keys: Tensor, values: Tensor) -> Arrival:
        """Start bringing the anchor together from the ranks' shares.

        Parameters
        ----------
        keys, values : (1, kv_heads, share_tokens, head_dim), local
        """
        raise NotImplementedError

    def start_kept(
        self, compressor: Compressor, group: SequenceGroup, served: Round, blocks: PassingBlocks, like: Tensor
    ) -> Arrival:
        """Compress this rank's blocks and start bringing together what the round's hosts keep.

        Parameters
        ----------
        served : the hosts of every rank in this round
        blocks : of this rank; read once
        like : keys, for their shape, dtype and device
        """
        raise NotImplementedError

    def first(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first tokens, (1, kv_heads, num_tokens, head_dim) each; they may be views."""
        raise NotImplementedError


class SentStates(PassedStates):
    """What ranks send each other, in one buffer: what a host sees is one slice of it.

    Parameters
    ----------
    like : keys, for their shape, dtype and device
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        super().__init__(plan)
        _, kv_heads, _, head_dim = like.shape
        # The last host passes nothing.
        self._buffer = like.new_empty((2, kv_heads, plan.anchor_length + plan.kept_offsets[plan.hosts - 1], head_dim))

    def start_anchor(self, group: SequenceGroup, keys: Tensor, values: Tensor) -> Arrival:
        if not self._plan.shard_anchor:
            copy_pair(keys, values, self._buffer[:, :, : self._plan.anchor_length])
            return nothing_to_wait_for
        shares = split_evenly(self._plan.anchor_length, group.world_size)
        longest = max(stop - start for start, stop in shares)
        message = _empty_messages(keys, 1, longest)[0]
        copy_pair(keys, values, message[:, :, : keys.shape[2]])
        pending = group.start_all_gather(message)
        return lambda: self.place_all(shares, pending.wait())

    def start_kept(
        self, compressor: Compressor, group: SequenceGroup, served: Round, blocks: PassingBlocks, like: Tensor
    ) -> Arrival:
        plan = self._plan
        spans = [[_span_of(plan, host) for host in turn] for turn in zip(*served, strict=True)]
        longest = max(stop - start for turn in spans for start, stop in turn)
        messages = _empty_messages(like, len(spans), longest)
        for index, host, states in blocks:
            count = plan.kept_lengths[host]
            compressor.compress(states, count, plan.num_eligible(host), messages[index, :, :, :count])
        pending = group.start_all_gather(messages)

        def arrive() -> None:
            everyone = pending.wait()
            for index, turn in enumerate(spans):
                self.place_all(turn, everyone[:, index])

        return arrive

    def place_all(self, spans: Sequence[Span], everyone: Tensor) -> None:
        """Put each rank's message, of (ranks, 2, kv_heads, longest, head_dim), keys first, at its span of tokens.

        Neighbouring messages of full length, in ascending or descending rank order, are copied at once: every copy is a
        kernel launch.
        """
        longest = everyone.shape[3]
        for ranks in _runs(spans, longest):
            start, stop = spans[ranks[0]][0], spans[ranks[-1]][1]
            if len(ranks) == 1:
                self._buffer[:, :, start:stop] = everyone[ranks[0], :, :, : stop - start]
                continue
            messages = everyone[min(ranks) : max(ranks) + 1]
            ordered = messages if ranks[0] < ranks[-1] else messages.flip(0)
            self._buffer[:, :, start:stop].unflatten(2, (len(ranks), longest)).copy_(ordered.permute(1, 2, 0, 3, 4))

    def first(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        return self._buffer[0:1, :, :num_tokens], self._buffer[1:2, :, :num_tokens]


def _runs(spans: Sequence[Span], longest: int) -> list[list[int]]:
    """Return the ranks with tokens to place, sorted by span, grouped into runs of neighbouring full messages."""
    runs: list[list[int]] = []
    for rank in sorted(
        (rank for rank, (start, stop) in enumerate(spans) if stop > start), key=lambda rank: spans[rank]
    ):
        start, stop = spans[rank]
        run = runs[-1] if runs else []
        is_next = bool(run) and spans[run[-1]][1] == start and stop - start == longest
        is_next = is_next and spans[run[0]][1] - spans[run[0]][0] == longest
        step = rank - run[-1] if run else 0
        if is_next and abs(step) == 1 and (len(run) == 1 or step == run[-1] - run[-2]):
            run.append(rank)
        else:
            runs.append([rank])
    return runs


def _span_of(plan: Plan, host: int) -> Span:
    """Return where what the host passes on lies among all that blocks see besides their own."""
    start = plan.anchor_length + plan.kept_offsets[host]
    return start, start + (plan.kept_lengths[host] if plan.is_passed_on(host) else 0)


def _empty_messages(like: Tensor, number: int, length: int) -> Tensor:
    """Return zeros for `number` messages of keys and values, (number, 2, kv_heads, length, head_dim)."""
    return like.new_zeros((number, 2, like.shape[1], length, like.shape[3]))


class OwnStates(PassedStates):
    """What a single rank passes to itself: its cache has every block, so it keeps indices and gathers states on use.

    Parameters
    ----------
    layer : the cache's layer; its tokens are the document's, in order
    like : keys, for their shape, dtype and device
    fused : whether states are gathered in one kernel
    """

    def __init__(self, plan: Plan, layer: ShardedCacheLayer, like: Tensor, fused: bool = False) -> None:
        super().__init__(plan)
        self._layer = layer
        self._fused = fused
        self._nothing = like.new_empty((2, like.shape[1], 0, like.shape[3]))
        self._anchor = self._nothing
        self._num_places = 0
        # If every earlier token is passed, a host sees the cache as it is.
        self._is_whole = plan.anchor_length == 0 and plan.kept_lengths[:-1] == tuple(
            plan.block_length(host) for host in range(plan.hosts - 1)
        )
        num_passed = 0 if self._is_whole else plan.kept_offsets[plan.hosts - 1]
        self._places = torch.empty((like.shape[1], num_passed), dtype=torch.int64, device=like.device)

    def start_anchor(self, group: SequenceGroup, keys: Tensor, values: Tensor) -> Arrival:
        self.keep_anchor(keys, values)
        return nothing_to_wait_for

    def start_kept(
        self, compressor: Compressor, group: SequenceGroup, served: Round, blocks: PassingBlocks, like: Tensor
    ) -> Arrival:
        for _, host, states in blocks:
            places = compressor.choose(states, self._plan.kept_lengths[host], self._plan.num_eligible(host))
            self.keep(places, states.start)
        return nothing_to_wait_for

    def keep_anchor(self, keys: Tensor, values: Tensor) -> None:
        """Keep the anchor's keys and values, (1, kv_heads, tokens, head_dim) each."""
        self._anchor = torch.cat([keys, values])  # views would keep the whole projections alive

    def keep(self, places: Tensor, start: int) -> None:
        """Keep the indices of a block's passed tokens, (kv_heads, tokens) int64 in document order, from `start` on."""
        if self._is_whole:
            return
        stop = self._num_places + places.shape[1]
        torch.add(places, start, out=self._places[:, self._num_places : stop])
        self._num_places = stop

    @profiling.belongs_to(profiling.COMPRESSOR)
    def first(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        anchor_length = self._anchor.shape[2]
        if num_tokens <= anchor_length:
            return self._anchor[0:1, :, :num_tokens], self._anchor[1:2, :, :num_tokens]
        keys, values = self._layer.shard()
        if self._is_whole:
            return keys[:, :, :num_tokens], values[:, :, :num_tokens]
        seen = keys.new_empty((2, keys.shape[1], num_tokens, keys.shape[3]))
        seen[:, :, :anchor_length] = self._anchor
        places = self._places[:, : num_tokens - anchor_length]
        gather(keys, values, places, seen[:, :, anchor_length:], self._fused)
        return seen[0:1], seen[1:2]
