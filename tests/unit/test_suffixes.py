"""Suffixes in slots: who stores which tokens, that they outlive growth and copies, and what is known of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tests.generated  # noqa: F401  settings of hypothesis
from apb_ds import suffixes
from apb_ds.cache import ShardedCache
from apb_ds.suffixes import CopiedDocument, Prefix, Shares, Slab, Suffix, SuffixPool
from apb_ds.utils.sizes import LayerAttention

CPU = torch.device("cpu")
PAGE, SLOT, WINDOW = 4, 8, 6
FULL = LayerAttention(heads=4, kv_heads=2, head_dim=4, value_dim=2, dtype=torch.float32)
WITHIN = LayerAttention(heads=4, kv_heads=1, head_dim=4, value_dim=4, window=WINDOW, dtype=torch.float32)
SHARED = LayerAttention(heads=4, kv_heads=2, head_dim=4, value_dim=4, stores=False)
LAYERS = [FULL, WITHIN, SHARED, FULL]
BYTES_OF_TOKEN = {None: 2 * 2 * (4 + 2) * 4, WINDOW: 1 * (4 + 4) * 4}


@pytest.fixture(autouse=True)
def small_sizes() -> Any:
    """Let ranks take turns and slots overflow within a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffixes, "PAGE_TOKENS", PAGE)
        patch.setattr(suffixes, "SMALLEST_SLOT", SLOT)
        yield


def write(pool: SuffixPool, suffix: Suffix, tokens: Sequence[int]) -> None:
    """Store tokens as a forward on this rank does, each as its own number."""
    pool.make_room(suffix, len(tokens))
    for window, place in suffix.places.items():
        if window is None and suffix.owner != pool.rank:
            continue
        for layer_idx, layer in enumerate(LAYERS):
            if layer.stores and layer.window == window:
                for states in place.slab.buffers(layer_idx):
                    numbers = torch.tensor(tokens, dtype=torch.float32)[:, None, None] + layer_idx / 8
                    states[place.slot, place.length : place.length + len(tokens)] = numbers
    pool.count(suffix, len(tokens))


def read(suffix: Suffix, window: int | None) -> list[int]:
    """Return the tokens that this rank stores, after checking that each layer has them whole."""
    place = suffix.places[window]
    found = []
    for layer_idx, layer in enumerate(LAYERS):
        if layer.stores and layer.window == window:
            for states in place.slab.buffers(layer_idx):
                stored = states[place.slot, : place.length] - layer_idx / 8
                numbers = stored[:, 0, 0]
                assert torch.equal(stored, numbers[:, None, None].expand_as(stored))
                found.append(numbers.int().tolist())
    assert all(tokens == found[0] for tokens in found)
    return found[0]


@dataclass
class Conversation:
    """One suffix on every rank, and the tokens that it must hold."""

    on_ranks: list[Suffix]
    tokens: list[int] = field(default_factory=list)
    longest: int = 0

    def check(self) -> None:
        assert len({(one.shares, one.num_tokens) for one in self.on_ranks}) == 1, "the ranks disagree"
        assert self.on_ranks[0].num_tokens == len(self.tokens)
        stored = [read(one, None) for one in self.on_ranks]
        assert sorted(token for of_rank in stored for token in of_rank) == sorted(self.tokens)
        assert all(of_rank == sorted(of_rank) for of_rank in stored)  # as they came
        assert tuple(map(len, stored)) == self.on_ranks[0].shares.stored
        spread = max(map(len, stored)) - min(map(len, stored))
        assert len(stored) == 1 or spread < PAGE + self.longest
        for one in self.on_ranks:
            tail = read(one, WINDOW)
            assert tail == self.tokens[len(self.tokens) - len(tail) :]
            assert len(tail) >= min(len(self.tokens), WINDOW - 1)


class Ranks:
    """The pools of all ranks, which do the same."""

    def __init__(self, world_size: int) -> None:
        self.pools = [SuffixPool(LAYERS, rank, world_size, CPU) for rank in range(world_size)]
        self._next = 0

    def new(self, forwards: Sequence[int], source: Conversation | None = None) -> Conversation:
        sources = [None] * len(self.pools) if source is None else source.on_ranks
        made = [pool.new(forwards, of_rank) for pool, of_rank in zip(self.pools, sources, strict=True)]
        return Conversation(made, [] if source is None else [*source.tokens], 0 if source is None else source.longest)

    def feed(self, conversation: Conversation, num_tokens: int) -> None:
        tokens = range(self._next, self._next + num_tokens)
        self._next += num_tokens
        conversation.tokens += tokens
        conversation.longest = max(conversation.longest, num_tokens)
        for pool, suffix in zip(self.pools, conversation.on_ranks, strict=True):
            write(pool, suffix, tokens)

    def free(self, conversation: Conversation) -> None:
        for pool, suffix in zip(self.pools, conversation.on_ranks, strict=True):
            pool.free(suffix)


def slot_bytes(suffix: Suffix) -> int:
    """Return the bytes of the slots that a suffix has on this rank."""
    return sum(place.slab.capacity * BYTES_OF_TOKEN[window] for window, place in suffix.places.items())


_FORWARDS = st.lists(st.integers(1, 3) | st.integers(1, 20), min_size=1, max_size=12)
_ACTIONS = st.lists(
    st.tuples(st.sampled_from(["new", "copy", "more", "free"]), st.integers(0, 9), _FORWARDS), min_size=1, max_size=10
)


@given(world_size=st.sampled_from([1, 2, 3, 4]), actions=_ACTIONS)
def test_suffixes_hold_their_tokens_in_as_many_bytes_as_was_said(
    world_size: int, actions: list[tuple[str, int, list[int]]]
) -> None:
    ranks = Ranks(world_size)
    alive: list[Conversation] = []
    for action, which, forwards in actions:
        one = alive[which % len(alive)] if alive else None
        if one is not None and action == "free":
            ranks.free(one)
            alive.remove(one)
        elif one is not None and action == "more":  # than was announced
            for num_tokens in forwards:
                ranks.feed(one, num_tokens)
        else:
            source = one if action == "copy" else None
            suffix = None if source is None else source.on_ranks[0]
            said = {pool.bytes_for(forwards, suffix) for pool in ranks.pools}
            assert len(said) == 1
            made = ranks.new(forwards, source)
            before = [slot_bytes(on_rank) for on_rank in made.on_ranks]
            for num_tokens in forwards:
                ranks.feed(made, num_tokens)
            assert [slot_bytes(on_rank) for on_rank in made.on_ranks] == before, "announced tokens move nothing"
            assert max(before) <= said.pop()
            alive.append(made)
        for conversation in alive:
            conversation.check()
    for conversation in alive:
        ranks.free(conversation)
    for pool in ranks.pools:
        assert all(slab.is_unused and slab.capacity == SLOT for slab in pool._slabs.values())


def test_a_suffix_begins_on_the_next_rank_and_turns_go_to_who_stores_least() -> None:
    ranks = Ranks(3)
    assert [ranks.new([1]).on_ranks[0].owner for _ in range(4)] == [0, 1, 2, 0]
    shares = Shares((0, 0, 0), owner=1)
    owners = []
    for num_tokens in (3, 1, 9, 4, 4, 4):  # a page; a long query; pages
        owners.append(shares.owner)
        shares = shares.after([num_tokens])
    assert owners == [1, 1, 2, 0, 1, 0]
    assert shares.stored == (8, 8, 9)


def test_long_queries_between_short_answers_are_shared() -> None:
    """Where ranks only took turns, one would get all queries and the other all answers."""
    shares = Shares((0, 0), owner=0)
    for _ in range(50):
        shares = shares.after([100, *[1] * PAGE])
    assert max(shares.stored) - min(shares.stored) < 100 + PAGE


def test_a_slab_grows_without_touching_others() -> None:
    slab = Slab({0: FULL}, SLOT, CPU)
    first = slab.take()
    for states in slab.buffers(0):
        states[first] = 7
    others = [slab.take() for _ in range(4)]
    assert len({first, *others}) == 5 and slab.scratch not in (first, *others)
    keys, values = slab.buffers(0)
    assert keys.shape == (slab.num_slots + 1, SLOT, 2, 4) and values.shape[-1] == 2
    assert bool((keys[first] == 7).all() and (values[first] == 7).all()) and int(keys[others].count_nonzero()) == 0
    assert slab.num_bytes == 4 * (keys.numel() + values.numel())
    slab.free(others[1])
    slab.free(first)
    assert slab.take() == min(first, others[1]), "the lowest free slot"


def test_memory_that_runs_out_while_a_slab_grows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SuffixPool(LAYERS, 0, 1, CPU)
    kept = pool.new([3])
    write(pool, kept, [1, 2, 3])
    bytes_before, zeros = pool.num_bytes, torch.zeros
    made: list[Any] = []

    def runs_out(*args: Any, **kwargs: Any) -> Tensor:
        made.append(args)
        if len(made) == 6:  # the last buffer of the second kind
            raise torch.OutOfMemoryError("no memory")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        pool.new([3])
    monkeypatch.undo()
    assert read(kept, None) == [1, 2, 3]
    suffix = pool.new([3])
    assert suffix.places[None].slot != kept.places[None].slot
    pool.free(suffix)
    pool.free(kept)
    assert all(slab.is_unused for slab in pool._slabs.values())
    assert bytes_before <= pool.num_bytes


def test_freed_slots_are_reused_and_large_slabs_dropped() -> None:
    pool = SuffixPool(LAYERS, 0, 1, CPU)
    small, large = pool.new([2]), pool.new([SLOT + 1])
    with_both = pool.num_bytes
    slot = small.places[None].slot
    pool.free(small)
    pool.free(small)  # twice does nothing
    assert pool.new([2]).places[None].slot == slot and pool.num_bytes == with_both
    pool.free(large)
    assert pool.num_bytes < with_both
    assert [key for key in pool._slabs if key[1] > SLOT] == []


def test_an_abandoned_suffix_is_freed_by_the_next_one() -> None:
    pool = SuffixPool(LAYERS, 0, 1, CPU)
    suffix = pool.new([2])
    slot = suffix.places[None].slot
    pool.abandon(suffix)
    assert pool.new([2]).places[None].slot == slot


def test_a_copy_and_its_source_go_different_ways() -> None:
    ranks = Ranks(2)
    source = ranks.new([3, 3])
    ranks.feed(source, 3)
    copies = [ranks.new([1, 9], source) for _ in range(2)]
    for one in (source, *copies):
        ranks.feed(one, 1)
        ranks.feed(one, 9)
    ranks.free(copies[0])
    for one in (source, copies[1]):
        one.check()
    assert source.tokens[:3] == copies[1].tokens[:3] and source.tokens[3:] != copies[1].tokens[3:]


def states(start: int, stop: int, layer: LayerAttention) -> tuple[Tensor, Tensor]:
    numbers = torch.arange(start, stop, dtype=torch.float32).reshape(1, 1, -1, 1)
    return numbers.repeat(1, layer.kv_heads, 1, layer.head_dim), numbers.repeat(1, layer.kv_heads, 1, layer.value_dim)


def test_a_prefix_stays_as_it_was_when_the_context_goes_on() -> None:
    layers = [FULL, WITHIN]
    cache = ShardedCache(layers, 0, 1, 10)
    for layer_idx, layer in enumerate(layers):
        cache.layer(layer_idx).store_block(*states(0, 10, layer))
    cache.set_length(10)
    prefix = Prefix(layers, cache)
    for start in (10, 13):
        cache.forget_unreachable()
        for layer_idx, layer in enumerate(layers):
            cache.update(*states(start, start + 3, layer), layer_idx)
    assert prefix.num_tokens == 10
    expected = [range(10), range(10 - WINDOW + 1, 10)]
    for layer_idx, tokens in enumerate(expected):
        found = prefix.states(layer_idx)
        assert found is not None
        for kept in found:
            assert kept[0, 0, :, 0].tolist() == [*tokens]


def test_a_prefix_of_no_tokens_has_no_states() -> None:
    prefix = Prefix(LAYERS)
    assert prefix.num_tokens == 0 and prefix.states(0) is None


@given(
    stored=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    forwards=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_a_copied_document_comes_first_on_the_rank_that_has_it(stored: list[int], forwards: list[int]) -> None:
    num_tokens = sum(stored)
    ends = [sum(stored[: rank + 1]) for rank in range(len(stored))]
    tokens = list(range(1, num_tokens + sum(forwards) + 1))
    found: list[list[int]] = []
    for rank, end in enumerate(ends):
        pool = SuffixPool(LAYERS, rank, len(stored), CPU)
        prefix = Prefix(LAYERS)
        prefix.num_tokens = num_tokens
        for layer_idx, layer in enumerate(LAYERS):
            first = max(0, num_tokens - WINDOW + 1) if layer.window else end - stored[rank]
            numbers = torch.tensor(tokens[first : num_tokens if layer.window else end]) + layer_idx / 8
            if layer.stores and len(numbers):
                shapes = layer.stored_shapes
                keys, values = (numbers[None, None, :, None].expand(1, heads, -1, width) for heads, width in shapes)
                prefix._states[layer_idx] = keys, values
        suffix = pool.new(forwards, document=CopiedDocument(prefix, tuple(stored)))
        assert suffix.num_tokens == num_tokens and suffix.shares.stored == tuple(stored)
        slabs = [place.slab for place in suffix.places.values()]
        fed = num_tokens
        for number in forwards:
            write(pool, suffix, tokens[fed : fed + number])
            fed += number
        assert [place.slab for place in suffix.places.values()] == slabs, "there was room for all of it"
        of_slots = sum(place.slab.capacity * BYTES_OF_TOKEN[window] for window, place in suffix.places.items())
        assert of_slots <= pool.bytes_for(forwards, stored=stored)
        found.append(read(suffix, None))
        assert read(suffix, WINDOW)[-min(fed, WINDOW - 1) :] == tokens[max(0, fed - WINDOW + 1) : fed]
    assert sorted(chain.from_iterable(found)) == tokens
    assert all(of[:number] == tokens[end - number : end] for of, number, end in zip(found, stored, ends, strict=True))
