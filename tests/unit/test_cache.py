"""The sharded cache: its length is global, what it stores is local."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from apb_ds import cache as cache_module
from apb_ds.cache import GROWTH_TOKENS, PAGE_TOKENS, STEP_TOKENS, ShardedCache, ShardedCacheLayer
from apb_ds.utils.sizes import LayerAttention

KV_HEADS, HEAD_DIM = 2, 4

LAYER = LayerAttention(heads=4, kv_heads=2, head_dim=4, value_dim=4)


def states(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens [start, stop), told apart by their entries."""
    tokens = torch.arange(start, stop, dtype=torch.float32).reshape(1, 1, -1, 1)
    keys = tokens.repeat(1, KV_HEADS, 1, HEAD_DIM) + torch.arange(KV_HEADS).reshape(1, -1, 1, 1) / 10
    return keys, -keys


def tokens_in(layer: ShardedCacheLayer) -> list[int]:
    """The tokens that a layer holds, after checking that each key and value is whole."""
    keys, values = layer.shard()
    found = keys[0, 0, :, 0].int().tolist()
    expected = torch.cat([states(token, token + 1)[0] for token in found], dim=2) if found else keys
    assert torch.equal(keys, expected) and torch.equal(values, -expected)
    return found


def filled(
    blocks: list[tuple[int, int]], num_tokens: int, num_layers: int = 2, rank: int = 0, world_size: int = 1
) -> ShardedCache:
    cache = ShardedCache([LAYER] * num_layers, rank, world_size, sum(stop - start for start, stop in blocks))
    for layer_idx in range(num_layers):
        for start, stop in blocks:
            cache.layer(layer_idx).store_block(*states(start, stop))
    cache.set_length(num_tokens)
    return cache


def test_it_is_a_transformers_cache() -> None:
    cache = ShardedCache([LAYER] * 3, 0, 1, 10)
    assert isinstance(cache, Cache) and len(cache.layers) == 3
    assert all(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    assert cache.get_seq_length() == 0 and cache.num_bytes == 0
    assert not cache.is_compileable
    assert cache.layer(0).get_max_length() == cache.layer(0).get_max_cache_shape() == -1


@pytest.mark.parametrize("rank", [0, 1])
def test_length_is_global_and_storage_local(rank: int) -> None:
    cache = filled([(10, 20), (30, 33)], 40, rank=rank, world_size=2)
    assert cache.get_seq_length() == 40 and cache.local_lengths()[None] == 13
    assert tokens_in(cache.layer(1)) == [*range(10, 20), *range(30, 33)]


def test_new_tokens_are_stored_by_their_owner_alone() -> None:
    owner = filled([(20, 40)], 40, rank=1, world_size=2)
    other = filled([(0, 20)], 40, rank=0, world_size=2)
    for start, stop in [(40, 45), (45, 46), (46, 47)]:
        for cache, length in ((owner, stop - 20), (other, 20)):
            for layer_idx in range(2):
                keys, values = cache.update(*states(start, stop), layer_idx)
                assert keys.shape == values.shape == (1, KV_HEADS, length, HEAD_DIM)
            assert cache.get_seq_length() == stop and cache.local_lengths()[None] == length
            assert cache.holds_new is (cache is owner)
    assert tokens_in(owner.layer(0)) == list(range(20, 47))
    assert tokens_in(other.layer(1)) == list(range(20))


def test_mask_sizes_take_the_number_of_queries_or_their_positions() -> None:
    layer = filled([(0, 5)], 40).layer(0)
    assert layer.get_mask_sizes(3) == layer.get_mask_sizes(torch.arange(40, 43)) == (43, 0)


def test_growth_loses_nothing_and_is_rare() -> None:
    cache = filled([(0, 9)], 9, num_layers=1)
    buffers = set()
    for token in range(9, 900):
        cache.update(*states(token, token + 1), 0)
        keys = cache.layer(0).keys
        assert keys is not None
        buffers.add(keys.data_ptr())
    assert tokens_in(cache.layer(0)) == list(range(900))
    assert len(buffers) <= 900 // GROWTH_TOKENS + 1


def test_the_room_asked_for_is_made_at_once() -> None:
    cache = filled([(0, 30)], 30)
    assert 30 + GROWTH_TOKENS <= STEP_TOKENS
    assert cache.num_bytes == 2 * 2 * KV_HEADS * STEP_TOKENS * HEAD_DIM * 4, "whole steps"


@pytest.mark.parametrize(
    ("world_size", "new_tokens", "steps"),
    [(1, 0, 1), (1, 40 * STEP_TOKENS, 41), (4, 0, 1), (4, 3 * STEP_TOKENS, 2), (4, 40 * STEP_TOKENS, 11)],
)
def test_each_rank_has_room_for_its_share_of_the_new_tokens(world_size: int, new_tokens: int, steps: int) -> None:
    """The share is at most a page above the average, and has the shard of 30 tokens before it."""
    for rank in range(world_size):
        cache = ShardedCache([LAYER], rank, world_size, 30, new_tokens)
        cache.layer(0).store_block(*states(0, 30))
        assert cache.buffers()[0].shape[2] == steps * STEP_TOKENS


def test_the_last_rank_has_room_for_a_query_in_one_piece() -> None:
    found = []
    for rank in range(4):
        cache = ShardedCache([LAYER], rank, 4, 30, 4 * STEP_TOKENS, query_tokens=3 * STEP_TOKENS)
        cache.layer(0).store_block(*states(0, 30))
        found.append(cache.buffers()[0].shape[2] // STEP_TOKENS)
    assert found == [2, 2, 2, 4]


def test_a_token_written_to_a_slot_is_counted_by_advance() -> None:
    usual, fixed = (filled([(0, 20)], 20) for _ in range(2))
    for layer_idx in range(2):
        usual.update(*states(20, 21), layer_idx)
    with fixed.writing_to({None: torch.tensor([20])}):
        for layer_idx in range(2):
            keys, values = fixed.update(*states(20, 21), layer_idx)
            assert keys is fixed.layer(layer_idx).keys and values is fixed.layer(layer_idx).values
        assert fixed.get_seq_length() == fixed.local_lengths()[None] == 20
    fixed.advance()
    assert fixed.get_seq_length() == fixed.local_lengths()[None] == 21
    for layer_idx in range(2):
        for ours, others in zip(fixed.layer(layer_idx).shard(), usual.layer(layer_idx).shard(), strict=True):
            assert torch.equal(ours, others)


def test_buffers_that_another_cache_has_left() -> None:
    before = filled([(0, 20)], 20)
    buffers = before.buffers()
    after = ShardedCache([LAYER] * 2, 0, 1, 20)
    assert after.take_over(buffers)
    for layer_idx in range(2):
        after.layer(layer_idx).store_block(*states(40, 55))
    assert all(one is other for one, other in zip(after.buffers(), buffers, strict=True))
    assert tokens_in(after.layer(1)) == list(range(40, 55))
    assert not ShardedCache([LAYER] * 2, 0, 1, STEP_TOKENS).take_over(buffers), "longer ones are needed"
    assert not ShardedCache([LAYER] * 3, 0, 1, 20).take_over(buffers)
    other = ShardedCache([LAYER] * 2, 0, 1, 20)
    assert other.take_over([buffer.double() for buffer in buffers])
    other.layer(0).store_block(*states(0, 5))
    keys = other.layer(0).keys
    assert keys is not None and keys.dtype == torch.float32, "of another dtype: made anew"


def test_buffers_with_room_for_more() -> None:
    cache = filled([(0, 20)], 20)
    before = [buffer.data_ptr() for buffer in cache.buffers(1)]
    assert len(before) == 4 and [buffer.data_ptr() for buffer in cache.buffers(STEP_TOKENS - 20)] == before
    assert all(buffer.shape[2] > STEP_TOKENS for buffer in cache.buffers(STEP_TOKENS - 19))
    assert tokens_in(cache.layer(0)) == list(range(20))


def test_more_blocks_than_announced() -> None:
    cache = ShardedCache([LAYER] * 1, 0, 2, 4)
    for start in range(0, 3000, 500):
        cache.layer(0).store_block(*states(start, start + 500))
    assert tokens_in(cache.layer(0)) == list(range(3000))


@pytest.mark.parametrize("rank", [0, 1])
def test_crop_to_after_an_update_of_some_layers(rank: int) -> None:
    """A forward that failed has filled the first layers only."""
    cache = filled([(0, 20)], 40, num_layers=3, rank=rank, world_size=2)
    for layer_idx in range(2):
        cache.update(*states(40, 46), layer_idx)
    cache.crop_to(40)
    for layer_idx in range(3):
        assert cache.get_seq_length(layer_idx) == 40 and cache.layer(layer_idx).local_length == 20
        assert tokens_in(cache.layer(layer_idx)) == list(range(20))
    cache.crop_to(40)  # nothing to forget
    cache.crop_to(99)  # nor here
    assert cache.get_seq_length() == 40


def test_what_is_cropped_is_overwritten() -> None:
    cache = filled([(0, 20)], 20, num_layers=1)
    cache.update(*states(50, 55), 0)
    cache.crop_to(22)
    cache.update(*states(60, 61), 0)
    assert tokens_in(cache.layer(0)) == [*range(20), 50, 51, 60] and cache.get_seq_length() == 23


def test_crop_counts_backwards() -> None:
    layer = filled([(0, 5)], 5).layer(0)
    layer.update(*states(5, 9))
    layer.crop(-3)
    assert tokens_in(layer) == list(range(6)) and layer.get_seq_length() == 6
    with pytest.raises(ValueError, match="tokens_to_remove=2 must be negative"):
        layer.crop(2)


def test_a_rank_without_a_block() -> None:
    """Fewer tokens than hosts: the shard is empty, but still a tensor of the right shape."""
    empty = ShardedCache([LAYER] * 1, 0, 2, 0)
    empty.set_length(3)
    keys, values = empty.update(*states(3, 5), 0)
    assert keys.shape == values.shape == (1, KV_HEADS, 0, HEAD_DIM) and empty.get_seq_length() == 5
    owner = ShardedCache([LAYER] * 1, 0, 1, 0)
    owner.set_length(3)
    assert owner.update(*states(3, 5), 0)[0].shape[2] == 2


def test_dtype_follows_what_is_stored_and_reset_frees_it() -> None:
    cache = ShardedCache([LAYER] * 1, 0, 1, 4)
    keys, values = states(0, 4)
    cache.layer(0).store_block(keys.bfloat16(), values.bfloat16())
    assert cache.layer(0).shard()[0].dtype == torch.bfloat16
    cache.reset()
    assert cache.num_bytes == 0 and cache.get_seq_length() == 0
    cache.update(*states(0, 3), 0)
    assert tokens_in(cache.layer(0)) == [0, 1, 2]


def test_memory_that_runs_out_while_growing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardedCache([LAYER] * 1, rank=0, world_size=1, shard_tokens=4)
    layer = cache.layer(0)
    keys, values = states(0, 4)
    layer.store_block(keys, values)
    cache.set_length(4)
    capacity = layer.capacity
    grown, calls = ShardedCacheLayer._grown, []

    def second_fails(self: ShardedCacheLayer, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return grown(self, *args)

    monkeypatch.setattr(ShardedCacheLayer, "_grown", second_fails)
    more = states(4, 4 + capacity)
    with pytest.raises(torch.OutOfMemoryError):
        layer.update(*more)
    assert (layer.capacity, layer.local_length, layer.global_length) == (capacity, 4, 4)
    found_keys, found_values = layer.update(*more)
    assert torch.equal(found_keys, torch.cat([keys, more[0]], dim=2))
    assert torch.equal(found_values, torch.cat([values, more[1]], dim=2))


WINDOWED = LayerAttention(heads=4, kv_heads=2, head_dim=4, value_dim=4, window=6)


class Ranks:
    """The caches of a document's ranks, of two layers that see all tokens and one with a window, fed in lockstep.

    Parameters
    ----------
    world_size : ranks, of which each stores ten tokens of the document
    """

    def __init__(self, world_size: int) -> None:
        self.start = self.length = 10 * world_size
        self.caches = [ShardedCache([LAYER, WINDOWED, LAYER], rank, world_size, 10) for rank in range(world_size)]
        for rank, cache in enumerate(self.caches):
            for layer_idx in (0, 2):
                cache.layer(layer_idx).store_block(*states(10 * rank, 10 * rank + 10))
            cache.layer(1).store_block(*states(self.start - 5, self.start))
            cache.set_length(self.start)

    def feed(self, num_tokens: int, num_layers: int = 3) -> list[int]:
        """Feed new tokens to the first layers of every rank; return which ranks say that they hold them."""
        for cache in self.caches:
            for layer_idx in range(num_layers):
                cache.update(*states(self.length, self.length + num_tokens), layer_idx)
        self.length += num_tokens
        return [rank for rank, cache in enumerate(self.caches) if cache.holds_new]

    def feed_to_slots(self) -> list[int]:
        """Feed one token as a recorded step does; return the ranks that count it."""
        counting = [cache.local_lengths(with_next=True)[None] for cache in self.caches]
        before = [cache.local_lengths()[None] for cache in self.caches]
        for cache in self.caches:
            cache.buffers(num_new=1)
            with cache.writing_to({kind: torch.tensor([length]) for kind, length in cache.local_lengths().items()}):
                for layer_idx in range(3):
                    keys, _ = cache.update(*states(self.length, self.length + 1), layer_idx)
                    slot = cache.layer(layer_idx).local_length
                    assert keys[0, 0, slot, 0] == self.length, "written on every rank: a recorded step does the same"
            cache.advance()
        self.length += 1
        assert [cache.local_lengths()[None] for cache in self.caches] == counting
        return [rank for rank, (one, other) in enumerate(zip(before, counting, strict=True)) if one != other]

    def crop_to(self, num_tokens: int) -> None:
        for cache in self.caches:
            cache.crop_to(num_tokens)
        self.length = num_tokens

    def new_tokens(self) -> list[list[int]]:
        """Return the new tokens that each rank holds, after checking that all layers agree."""
        found = []
        for rank, cache in enumerate(self.caches):
            own, windowed, other = (tokens_in(cache.layer(layer_idx)) for layer_idx in range(3))
            assert own == other and own[:10] == list(range(10 * rank, 10 * rank + 10))
            assert windowed == list(range(self.start - 5, self.length)), "every rank has all of a window"
            assert {cache.get_seq_length(layer_idx) for layer_idx in range(3)} == {self.length}
            found.append(own[10:])
        return found


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PAGE_TOKENS", 4)


def test_ranks_take_turns_beginning_with_the_last(small_pages: None) -> None:
    ranks = Ranks(3)
    assert [ranks.feed(1) for _ in range(14)] == [[2]] * 4 + [[0]] * 4 + [[1]] * 4 + [[2]] * 2
    assert ranks.new_tokens() == [[34, 35, 36, 37], [38, 39, 40, 41], [30, 31, 32, 33, 42, 43]]


def test_the_tokens_of_a_forward_stay_together(small_pages: None) -> None:
    ranks = Ranks(3)
    assert [ranks.feed(num_tokens) for num_tokens in (3, 9, 2, 2, 1)] == [[2], [2], [0], [0], [1]]
    assert ranks.new_tokens() == [[42, 43, 44, 45], [46], list(range(30, 42))]


def test_a_turn_is_a_page() -> None:
    ranks = Ranks(2)
    assert [ranks.feed(num_tokens) for num_tokens in (PAGE_TOKENS - 1, 1, 1)] == [[1], [1], [0]]


@pytest.mark.parametrize("kept", [30, 31, 33, 34, 35, 38, 41])
def test_crop_across_a_change_of_owner(small_pages: None, kept: int) -> None:
    """What is left is as if no more had come, and what follows goes where it would have gone."""
    ranks, others = Ranks(3), Ranks(3)
    for _ in range(12):
        ranks.feed(1)
    ranks.crop_to(kept)
    for _ in range(kept - 30):
        others.feed(1)
    assert ranks.new_tokens() == others.new_tokens()
    for num_tokens in (5, 1, 1, 3, 3, 1):
        assert ranks.feed(num_tokens) == others.feed(num_tokens)
    assert ranks.new_tokens() == others.new_tokens()


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_a_forward_that_failed_in_some_layers(small_pages: None, reached: int) -> None:
    """It would have begun a turn; on every rank another layer may have been the last that it reached."""
    ranks = Ranks(3)
    ranks.feed(4)
    for rank, cache in enumerate(ranks.caches):
        for layer_idx in range((reached + rank) % 3):
            cache.update(*states(34, 40), layer_idx)
    ranks.crop_to(34)
    assert ranks.new_tokens() == [[], [], [30, 31, 32, 33]]
    assert [ranks.feed(num_tokens) for num_tokens in (2, 2, 1)] == [[0], [0], [1]]
    assert ranks.new_tokens() == [[34, 35, 36, 37], [38], [30, 31, 32, 33]]


def test_a_forward_that_failed_after_others_were_dropped(small_pages: None) -> None:
    """Turns that began after the tokens that are kept count no more, whether or not a rank's layers were reached."""
    ranks = Ranks(3)
    for num_tokens in (2, 3, 4, 4):
        ranks.feed(num_tokens)
    ranks.crop_to(32)
    ranks.caches[0].update(*states(32, 33), 0)
    ranks.crop_to(32)
    assert ranks.new_tokens() == [[], [], [30, 31]]
    assert [ranks.feed(1) for _ in range(7)] == [[2]] * 2 + [[0]] * 4 + [[1]]
    assert ranks.new_tokens() == [[34, 35, 36, 37], [38], [30, 31, 32, 33]]


def test_slots_are_counted_by_their_owner(small_pages: None) -> None:
    ranks = Ranks(3)
    assert ranks.feed(3) == [2]
    assert [ranks.feed_to_slots() for _ in range(6)] == [[2]] + [[0]] * 4 + [[1]]
    assert ranks.feed(2) == [1]
    assert ranks.new_tokens() == [[34, 35, 36, 37], [38, 39, 40], [30, 31, 32, 33]]


def test_slots_need_room_on_every_rank() -> None:
    full = filled([(0, STEP_TOKENS - GROWTH_TOKENS)], 1000, rank=0, world_size=2)
    full.layer(0).store_block(*states(0, GROWTH_TOKENS))
    full.layer(1).store_block(*states(0, GROWTH_TOKENS))
    assert full.local_lengths(with_next=True)[None] == STEP_TOKENS == full.buffers()[0].shape[2]
    assert full.buffers(num_new=1)[0].shape[2] > STEP_TOKENS


def test_any_forwards_and_crops(small_pages: None) -> None:
    """Together the ranks hold every token once, and none has more than a page and a forward above another."""
    chance = random.Random(0)
    ranks = Ranks(4)
    for _ in range(150):
        action = chance.choice(["feed", "feed", "slots", "crop"])
        if action == "feed":
            assert len(ranks.feed(chance.randint(1, 3))) == 1
        elif action == "slots":
            assert len(ranks.feed_to_slots()) == 1
        else:
            ranks.crop_to(max(ranks.start, ranks.length - chance.randint(0, 4)))
        found = ranks.new_tokens()
        assert sorted(itertools.chain(*found)) == list(range(ranks.start, ranks.length))
        lengths = [len(tokens) for tokens in found]
        assert max(lengths) - min(lengths) < 4 + 3
    assert ranks.length > ranks.start + 50


def test_long_questions_with_short_answers_are_shared(small_pages: None) -> None:
    """Taking turns without looking would give one of two ranks all questions."""
    ranks = Ranks(2)
    for _ in range(8):
        ranks.feed(40)
        for _ in range(4):
            ranks.feed(1)
    one, other = (len(tokens) for tokens in ranks.new_tokens())
    assert abs(one - other) <= 44


def test_one_rank_stores_everything_in_order(small_pages: None) -> None:
    ranks = Ranks(1)
    for num_tokens in (1, 9, 1, 4, 4):
        assert ranks.feed(num_tokens) == [0]
    ranks.crop_to(15)
    assert ranks.new_tokens() == [list(range(10, 15))]


def test_a_window_that_has_moved_on_is_cropped(small_pages: None) -> None:
    ranks = Ranks(2)
    for _ in range(9):
        ranks.feed(1)
    for cache in ranks.caches:
        cache.forget_unreachable()
    ranks.feed(3)
    ranks.crop_to(29)
    assert [tokens_in(cache.layer(1)) for cache in ranks.caches] == [list(range(24, 29))] * 2
