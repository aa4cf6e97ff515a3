"""The sharded cache: its length is global, what it stores is local."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from apb_ds.cache import GROWTH_TOKENS, STEP_TOKENS, ShardedCache, ShardedCacheLayer
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


def filled(stores_new: bool, blocks: list[tuple[int, int]], num_tokens: int, num_layers: int = 2) -> ShardedCache:
    cache = ShardedCache([LAYER] * num_layers, stores_new, sum(stop - start for start, stop in blocks))
    for layer_idx in range(num_layers):
        for start, stop in blocks:
            cache.layer(layer_idx).store_block(*states(start, stop))
    cache.set_length(num_tokens)
    return cache


def test_it_is_a_transformers_cache() -> None:
    cache = ShardedCache([LAYER] * 3, True, 10)
    assert isinstance(cache, Cache) and len(cache.layers) == 3
    assert all(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    assert cache.get_seq_length() == 0 and cache.num_bytes == 0
    assert not cache.is_compileable
    assert cache.layer(0).get_max_length() == cache.layer(0).get_max_cache_shape() == -1


@pytest.mark.parametrize("stores_new", [True, False])
def test_length_is_global_and_storage_local(stores_new: bool) -> None:
    cache = filled(stores_new, [(10, 20), (30, 33)], 40)
    assert cache.get_seq_length() == 40 and cache.local_lengths()[None] == 13
    assert tokens_in(cache.layer(1)) == [*range(10, 20), *range(30, 33)]


def test_new_tokens_are_stored_by_their_owner_alone() -> None:
    owner, other = filled(True, [(20, 40)], 40), filled(False, [(0, 20)], 40)
    for start, stop in [(40, 45), (45, 46), (46, 47)]:
        for cache, length in ((owner, stop - 20), (other, 20)):
            for layer_idx in range(2):
                keys, values = cache.update(*states(start, stop), layer_idx)
                assert keys.shape == values.shape == (1, KV_HEADS, length, HEAD_DIM)
            assert cache.get_seq_length() == stop and cache.local_lengths()[None] == length
    assert tokens_in(owner.layer(0)) == list(range(20, 47))
    assert tokens_in(other.layer(1)) == list(range(20))


@pytest.mark.parametrize("stores_new", [True, False])
def test_mask_sizes_take_the_number_of_queries_or_their_positions(stores_new: bool) -> None:
    layer = filled(stores_new, [(0, 5)], 40).layer(0)
    assert layer.get_mask_sizes(3) == layer.get_mask_sizes(torch.arange(40, 43)) == (43, 0)


def test_growth_loses_nothing_and_is_rare() -> None:
    cache = filled(True, [(0, 9)], 9, num_layers=1)
    buffers = set()
    for token in range(9, 900):
        cache.update(*states(token, token + 1), 0)
        keys = cache.layer(0).keys
        assert keys is not None
        buffers.add(keys.data_ptr())
    assert tokens_in(cache.layer(0)) == list(range(900))
    assert len(buffers) <= 900 // GROWTH_TOKENS + 1


def test_the_room_asked_for_is_made_at_once() -> None:
    layer = filled(False, [(0, 30), (60, 100)], 100).layer(0)
    assert layer.keys is not None and layer.keys.shape[2] == 70
    assert layer.num_bytes == 2 * KV_HEADS * 70 * HEAD_DIM * 4
    owner = filled(True, [(0, 30)], 30)
    assert 30 + GROWTH_TOKENS <= STEP_TOKENS
    assert owner.num_bytes == 2 * 2 * KV_HEADS * STEP_TOKENS * HEAD_DIM * 4, "whole steps, where tokens are added"


def test_a_token_written_to_a_slot_is_counted_by_advance() -> None:
    usual, fixed = (filled(True, [(0, 20)], 20) for _ in range(2))
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
    before = filled(True, [(0, 20)], 20)
    buffers = before.buffers()
    after = ShardedCache([LAYER] * 2, True, 20)
    assert after.take_over(buffers)
    for layer_idx in range(2):
        after.layer(layer_idx).store_block(*states(40, 55))
    assert all(one is other for one, other in zip(after.buffers(), buffers, strict=True))
    assert tokens_in(after.layer(1)) == list(range(40, 55))
    assert not ShardedCache([LAYER] * 2, True, STEP_TOKENS).take_over(buffers), "longer ones are needed"
    assert not ShardedCache([LAYER] * 3, True, 20).take_over(buffers)
    other = ShardedCache([LAYER] * 2, True, 20)
    assert other.take_over([buffer.double() for buffer in buffers])
    other.layer(0).store_block(*states(0, 5))
    keys = other.layer(0).keys
    assert keys is not None and keys.dtype == torch.float32, "of another dtype: made anew"


def test_buffers_with_room_for_more() -> None:
    cache = filled(True, [(0, 20)], 20)
    before = [buffer.data_ptr() for buffer in cache.buffers(1)]
    assert len(before) == 4 and [buffer.data_ptr() for buffer in cache.buffers(STEP_TOKENS - 20)] == before
    assert all(buffer.shape[2] > STEP_TOKENS for buffer in cache.buffers(STEP_TOKENS - 19))
    assert tokens_in(cache.layer(0)) == list(range(20))


def test_more_blocks_than_announced() -> None:
    cache = ShardedCache([LAYER] * 1, False, 4)
    for start in range(0, 3000, 500):
        cache.layer(0).store_block(*states(start, start + 500))
    assert tokens_in(cache.layer(0)) == list(range(3000))


@pytest.mark.parametrize("stores_new, length", [(True, 20), (False, 20)])
def test_crop_to_after_an_update_of_some_layers(stores_new: bool, length: int) -> None:
    """A forward that failed has filled the first layers only."""
    cache = filled(stores_new, [(0, 20)], 40, num_layers=3)
    for layer_idx in range(2):
        cache.update(*states(40, 46), layer_idx)
    cache.crop_to(40)
    for layer_idx in range(3):
        assert cache.get_seq_length(layer_idx) == 40 and cache.layer(layer_idx).local_length == length
        assert tokens_in(cache.layer(layer_idx)) == list(range(20))
    cache.crop_to(40)  # nothing to forget
    cache.crop_to(99)  # nor here
    assert cache.get_seq_length() == 40


def test_what_is_cropped_is_overwritten() -> None:
    cache = filled(True, [(0, 20)], 20, num_layers=1)
    cache.update(*states(50, 55), 0)
    cache.crop_to(22)
    cache.update(*states(60, 61), 0)
    assert tokens_in(cache.layer(0)) == [*range(20), 50, 51, 60] and cache.get_seq_length() == 23


def test_crop_counts_backwards() -> None:
    layer = filled(True, [(0, 5)], 5).layer(0)
    layer.update(*states(5, 9))
    layer.crop(-3)
    assert tokens_in(layer) == list(range(6)) and layer.get_seq_length() == 6
    with pytest.raises(ValueError, match="tokens_to_remove=2 must be negative"):
        layer.crop(2)


def test_a_rank_without_a_block() -> None:
    """Fewer tokens than hosts: the shard is empty, but still a tensor of the right shape."""
    empty = ShardedCache([LAYER] * 1, False, 0)
    empty.set_length(3)
    keys, values = empty.update(*states(3, 5), 0)
    assert keys.shape == values.shape == (1, KV_HEADS, 0, HEAD_DIM) and empty.get_seq_length() == 5
    owner = ShardedCache([LAYER] * 1, True, 0)
    owner.set_length(3)
    assert owner.update(*states(3, 5), 0)[0].shape[2] == 2


def test_dtype_follows_what_is_stored_and_reset_frees_it() -> None:
    cache = ShardedCache([LAYER] * 1, True, 4)
    keys, values = states(0, 4)
    cache.layer(0).store_block(keys.bfloat16(), values.bfloat16())
    assert cache.layer(0).shard()[0].dtype == torch.bfloat16
    cache.reset()
    assert cache.num_bytes == 0 and cache.get_seq_length() == 0
    cache.update(*states(0, 3), 0)
    assert tokens_in(cache.layer(0)) == [0, 1, 2]


def test_memory_that_runs_out_while_growing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardedCache([LAYER] * 1, stores_new=True, shard_tokens=4)
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
