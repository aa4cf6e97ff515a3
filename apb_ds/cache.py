"""The sharded KV cache, a transformers ``Cache``: its length is global, what it stores is this rank's shard.

A rank stores the keys and values of the blocks it serves; new tokens (queries and generated ones) are stored on the
last rank only. A shard's tokens need no order: keys carry their rotation, and every query sees all of them.

Layers that attend within a window are stored otherwise: every rank has what the window still reaches, and the new
tokens, in order. That is little, and attending to it needs no other rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from apb_ds.utils.sizes import LayerAttention

GROWTH_TOKENS = 256
# Buffers that can grow are a multiple of this long, so that documents of similar length get buffers of the same size.
STEP_TOKENS = 512


class ShardedCacheLayer(CacheLayerMixin):
    """One layer's shard, in buffers that grow in steps, not per token.

    Keys and values are written in two places only: `store_block` in a prefill, `update` afterwards.

    Parameters
    ----------
    stores_new : bool
        Whether this rank stores the tokens that come after the document.
    is_expanded : bool
        Whether the model expands what `update` returns. Models cannot expand an empty tensor, so an empty rank returns
        one token of zeros, which the attention skips.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, stores_new: bool, is_expanded: bool = False) -> None:
        super().__init__()
        self.stores_new = stores_new
        self.is_expanded = is_expanded
        self.global_length = 0
        self.local_length = 0
        self.capacity = 0
        self.slot: Tensor | None = None
        self.given: tuple[Tensor, Tensor] | None = None  # buffers to use if they are like those that would be made

    def reserve(self, num_tokens: int) -> None:
        """Ask for room for `num_tokens` local tokens when the buffers are first made."""
        self.capacity = max(self.capacity, num_tokens)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers for such states, (1, kv_heads, tokens, head_dim) each, or take those that were given."""
        self.dtype, self.device = key_states.dtype, key_states.device
        made_of = (key_states, value_states)
        given, self.given = self.given, None
        if given is None or not all(map(self._is_like, given, made_of)):
            given = self._buffer_like(key_states, self.capacity), self._buffer_like(value_states, self.capacity)
        self.keys, self.values = given
        self.is_initialized = True

    def store_block(self, keys: Tensor, values: Tensor) -> None:
        """Append one block, (1, kv_heads, block_tokens, head_dim) each; the global length is set by `set_length`."""
        self._append(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count new tokens, (1, kv_heads, tokens, head_dim), store them if this is their rank, and return the shard.

        Returns
        -------
        keys, values : (1, kv_heads, local_tokens, head_dim), local; views of the buffers, possibly of no tokens. With a
            `slot`, the whole buffers: the token is written to that slot if this is its rank, and counted by `advance`.
        """
        if self.slot is not None:
            buffers = self.buffers()
            if self.stores_new:
                for buffer, states in zip(buffers, (key_states, value_states), strict=True):
                    buffer.index_copy_(2, self.slot, states)
            return buffers
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.stores_new:
            self._append(key_states, value_states)
        self.global_length += key_states.shape[-2]
        if self.is_expanded and self.local_length == 0:
            return torch.zeros_like(key_states[:, :, :1]), torch.zeros_like(value_states[:, :, :1])
        return self.shard()

    def advance(self) -> None:
        """Count one new token that was written to the `slot` behind the last one, on the rank that stores it."""
        if self.stores_new:
            self.local_length += 1
        self.global_length += 1

    def clear_unused(self) -> None:
        """Zero what the buffers hold behind the stored tokens."""
        for buffer in self.buffers():
            buffer[:, :, self.local_length :] = 0

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Return the buffers of keys and values, (1, kv_heads, capacity, head_dim) each.

        Raises
        ------
        RuntimeError
            Before anything was stored.
        """
        if self.keys is None or self.values is None:
            raise RuntimeError("this layer of the cache is empty: nothing was stored in it.")
        return self.keys, self.values

    def shard(self) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values, (1, kv_heads, local_tokens, head_dim)."""
        keys, values = self.buffers()
        return keys[:, :, : self.local_length], values[:, :, : self.local_length]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, which must have come after the document."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be negative: how many tokens to forget.")
        self.global_length += tokens_to_remove
        if self.stores_new:
            self.local_length += tokens_to_remove

    def reset(self) -> None:
        """Forget everything and free the buffers."""
        self.keys = self.values = None
        self.is_initialized = False
        self.global_length = self.local_length = 0

    def get_seq_length(self) -> int:
        return self.global_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # transformers before 5.20 passes the positions of the queries here, not their number.
        num_queries = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.global_length + num_queries, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return -1

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers on this rank."""
        if not self.is_initialized:
            return 0
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def _append(self, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        stop = self.local_length + keys.shape[-2]
        self.make_room(stop)
        for buffer, states in zip(self.buffers(), (keys, values), strict=True):
            buffer[:, :, self.local_length : stop] = states
        self.local_length = stop

    def make_room(self, num_tokens: int) -> None:
        """Make the buffers longer if they do not hold `num_tokens` tokens."""
        if num_tokens <= self.capacity:
            return
        # An eighth more than needed keeps the copies rare without doubling a long shard.
        capacity = _stepped(num_tokens + max(GROWTH_TOKENS, num_tokens // 8))
        grown = [self._grown(buffer, capacity) for buffer in self.buffers()]
        # Changed once both exist: memory may run out, and a caller may then try again.
        self.keys, self.values = grown
        self.capacity = capacity

    def _buffer_like(self, states: Tensor, capacity: int) -> Tensor:
        batch, kv_heads, _, head_dim = states.shape
        return states.new_empty((batch, kv_heads, capacity, head_dim))

    def _is_like(self, buffer: Tensor, states: Tensor) -> bool:
        same = buffer.dtype == states.dtype and buffer.device == states.device
        shape = (*states.shape[:2], self.capacity, states.shape[3])
        return same and tuple(buffer.shape) == shape

    def _grown(self, buffer: Tensor, capacity: int) -> Tensor:
        grown = self._buffer_like(buffer, capacity)
        grown[:, :, : self.local_length] = buffer[:, :, : self.local_length]
        return grown


class WindowCacheLayer(ShardedCacheLayer):
    """A layer that attends within a window: the tokens that a later one can see, in order, on every rank.

    Tokens that the window has left behind are dropped by `forget_unreachable`, not while a turn may still be cropped.

    Parameters
    ----------
    window : int
        How many tokens a token sees, itself included.
    """

    def __init__(self, window: int) -> None:
        super().__init__(stores_new=True)
        self.window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens, and return what they see: the tokens before them in the window, and themselves.

        Returns
        -------
        keys, values : (1, kv_heads, up to window - 1 + tokens, head_dim), the same on every rank. With a `slot`, the
            whole buffers.
        """
        keys, values = super().update(key_states, value_states)
        if self.slot is not None:
            return keys, values
        seen = self.window - 1 + key_states.shape[-2]
        return keys[:, :, -seen:], values[:, :, -seen:]

    def forget_unreachable(self) -> None:
        """Drop the tokens that no later one sees; what is left cannot be cropped."""
        kept = self.window - 1
        if self.local_length <= kept:
            return
        for buffer in self.buffers():
            buffer[:, :, :kept] = buffer[:, :, self.local_length - kept : self.local_length].clone()
        self.local_length = kept


def _stepped(num_tokens: int) -> int:
    return -(-num_tokens // STEP_TOKENS) * STEP_TOKENS


class ShardedCache(Cache):
    """The cache of one context on one rank.

    Parameters
    ----------
    layers : sequence of LayerAttention
        How each layer attends; those with a window are stored on every rank.
    stores_new : bool
        Whether this rank stores the tokens that come after the document (the last rank does).
    shard_tokens : int
        Document tokens that this rank will store, for sizing the buffers.
    new_tokens : int
        Tokens that are expected after the document, likewise.

    Attributes
    ----------
    attention : the layers, as they were given
    """

    def __init__(
        self, layers: Sequence[LayerAttention], stores_new: bool, shard_tokens: int, new_tokens: int = 0
    ) -> None:
        self.attention = tuple(layers)
        self._sharded_layers: list[ShardedCacheLayer] = []
        for attention in layers:
            if attention.window is None:
                layer = ShardedCacheLayer(stores_new, is_expanded=attention.stores and not attention.stores_attended)
                num_document = shard_tokens
            else:
                layer = WindowCacheLayer(attention.window)
                num_document = attention.window - 1
            grows = _stepped(num_document + max(GROWTH_TOKENS, new_tokens))
            layer.reserve(grows if layer.stores_new else num_document)
            self._sharded_layers.append(layer)
        self._storing = [layer for layer, of in zip(self._sharded_layers, layers, strict=True) if of.stores]
        super().__init__(layers=self._sharded_layers)  # type: ignore[arg-type]

    def layer(self, layer_idx: int) -> ShardedCacheLayer:
        """Return one layer's shard."""
        return self._sharded_layers[layer_idx]

    def set_length(self, num_tokens: int) -> None:
        """Set the global length once all blocks are stored."""
        for layer in self._sharded_layers:
            layer.global_length = num_tokens

    @contextmanager
    def writing_to(self, slots: Mapping[int | None, Tensor]) -> Iterator[None]:
        """Have new tokens written at places that are read on the device, and whole buffers given out.

        Parameters
        ----------
        slots : by `LayerAttention.window`, (1,) int64 each
        """
        try:
            for attention, layer in zip(self.attention, self._sharded_layers, strict=True):
                layer.slot = slots[attention.window]
            yield
        finally:
            for layer in self._sharded_layers:
                layer.slot = None

    def advance(self) -> None:
        """Count one new token that was written to the slots, in all layers."""
        for layer in self._sharded_layers:
            layer.advance()

    def clear_unused(self) -> None:
        """Zero what the buffers hold behind the stored tokens, in all layers.

        New buffers hold arbitrary bits. A kernel that reads whole tiles gives the unused part zero weight, but zero
        times NaN is NaN.
        """
        for layer in self._storing:
            layer.clear_unused()

    def take_over(self, buffers: Sequence[Tensor]) -> bool:
        """Use another cache's buffers, as `buffers` gave them, in place of new ones; return whether they fit.

        The other cache must not be used any more.
        """
        if len(buffers) != 2 * len(self._storing):
            return False
        pairs = list(zip(buffers[::2], buffers[1::2], strict=True))
        if any(keys.shape[2] != layer.capacity for (keys, _), layer in zip(pairs, self._storing, strict=True)):
            return False
        for layer, pair in zip(self._storing, pairs, strict=True):
            layer.given = pair
        return True

    def buffers(self, num_new: int = 0) -> list[Tensor]:
        """Return all layers' buffers of keys and values, (1, kv_heads, capacity, head_dim).

        Parameters
        ----------
        num_new : for how many new tokens they must have room
        """
        found: list[Tensor] = []
        for layer in self._storing:
            layer.make_room(layer.local_length + num_new * int(layer.stores_new))
            found += layer.buffers()
        return found

    def forget_unreachable(self) -> None:
        """Drop the tokens that windows have left behind; call it before a turn, which may be cropped again."""
        for layer in self._storing:
            if isinstance(layer, WindowCacheLayer):
                layer.forget_unreachable()

    def crop_to(self, num_tokens: int) -> None:
        """Forget what came after the first `num_tokens` tokens, layer by layer (a failed forward fills only some)."""
        for layer in self._sharded_layers:
            layer.crop(min(0, num_tokens - layer.global_length))

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers on this rank."""
        return sum(layer.num_bytes for layer in self._sharded_layers)

    def local_lengths(self, *, with_next: bool = False) -> dict[int | None, int]:
        """Return the tokens stored on this rank by `LayerAttention.window`.

        Parameters
        ----------
        with_next : once one more new token has come
        """
        storing = (of for of in self.attention if of.stores)
        return {
            of.window: layer.local_length + int(with_next and layer.stores_new)
            for of, layer in zip(storing, self._storing, strict=True)
        }
