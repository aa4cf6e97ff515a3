"""The sharded KV cache, a transformers ``Cache``: its length is global, what it stores is this rank's shard.

A rank stores the keys and values of the blocks it serves. New tokens (queries and generated ones) fill the ranks in
turn: all tokens of a forward are stored on one rank, and after a page of them it is another rank's turn. A shard's
tokens need no order: keys carry their rotation, and every query sees all of them.

Layers that attend within a window are stored otherwise: every rank has what the window still reaches, and the new
tokens, in order. That is little, and attending to it needs no other rank.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from apb_ds.utils.sizes import LayerAttention

GROWTH_TOKENS = 256
# Buffers that can grow are a multiple of this long, so that documents of similar length get buffers of the same size.
STEP_TOKENS = 512
# After so many new tokens another rank takes over, at the next forward.
PAGE_TOKENS = 256


class Owners:
    """Which rank stores which of the tokens after the document.

    A rank's turn ends with the forward that fills its page. Then the rank that stores the fewest takes over; of equal
    ones, the next in order. This depends only on the positions of the forwards, so the ranks agree without a message.

    All layers of a cache share one record. A forward that failed in some of them is taken back by `crop` alone: what is
    noted for later positions counts no more once a forward begins before them.

    Parameters
    ----------
    rank : int
        This rank.
    world_size : int
        Ranks that take turns. The last one begins.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        # Turns in order: the position at which each began, and whose it is.
        self._starts: list[int] = []
        self._ranks: list[int] = []

    def begin(self, position: int) -> bool:
        """Note that a forward stores tokens from `position` on; return whether this rank stores them.

        Every layer calls it, and all of them get the same answer.
        """
        start, rank = self._turn_at(position)
        if self._starts[-1:] != [start]:
            kept = bisect_right(self._starts, start - 1)
            self._starts[kept:], self._ranks[kept:] = [start], [rank]
        return rank == self._rank

    def stores_next(self, position: int) -> bool:
        """Whether this rank would store a forward that begins at `position`."""
        return self._turn_at(position)[1] == self._rank

    @property
    def stored_last(self) -> bool:
        """Whether this rank stores the forward that was noted last."""
        return self._ranks[-1:] == [self._rank]

    def num_stored(self, start: int, stop: int) -> int:
        """Return how many of the tokens at the positions [start, stop), after the document, this rank stores."""
        return self._num_of(self._rank, start, stop)

    def _num_of(self, rank: int, start: int, stop: int) -> int:
        turns = zip(pairwise([*self._starts, stop]), self._ranks, strict=True)
        return sum(max(0, min(stop, end) - max(start, begin)) for (begin, end), of in turns if of == rank)

    def _turn_at(self, position: int) -> tuple[int, int]:
        """Return when the turn began, and whose it is, that a forward at `position` belongs to."""
        index = bisect_right(self._starts, position) - 1
        if index < 0:
            return position, self._world_size - 1
        start, rank = self._starts[index], self._ranks[index]
        if position - start < PAGE_TOKENS:
            return start, rank
        in_order = [(rank + step) % self._world_size for step in range(1, self._world_size + 1)]
        return position, min(in_order, key=lambda other: self._num_of(other, self._starts[0], position))


class ShardedCacheLayer(CacheLayerMixin):
    """One layer's shard, in buffers that grow in steps, not per token.

    Keys and values are written in two places only: `store_block` in a prefill, `update` afterwards.

    Parameters
    ----------
    owners : Owners
        Which rank stores the tokens that come after the document; of all layers alike.
    is_expanded : bool
        Whether the model expands what `update` returns. Models cannot expand an empty tensor, so an empty rank returns
        one token of zeros, which the attention skips.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, owners: Owners, is_expanded: bool = False) -> None:
        super().__init__()
        self.owners = owners
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
        self.hold(*self.made_buffers(key_states, value_states), num_tokens=0)

    def made_buffers(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return buffers for such states, of the capacity that was reserved: those that were given, or new ones."""
        given, self.given = self.given, None
        if given is not None and self._is_like(given[0], keys) and self._is_like(given[1], values):
            return given
        return self._buffer_like(keys, self.capacity), self._buffer_like(values, self.capacity)

    def hold(self, keys: Tensor, values: Tensor, num_tokens: int) -> None:
        """Use these buffers, which hold so many stored tokens."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.local_length = num_tokens
        self.is_initialized = True

    def store_block(self, keys: Tensor, values: Tensor) -> None:
        """Append one block, (1, kv_heads, block_tokens, head_dim) each; the global length is set by `set_length`."""
        self._append(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count a forward's new tokens, (1, kv_heads, tokens, head_dim), store them if it is this rank's turn.

        Returns
        -------
        keys, values : (1, kv_heads, local_tokens, head_dim), local; views of the buffers, possibly of no tokens. With a
            `slot`, the whole buffers: every rank writes the token to its slot, and `advance` counts it on one of them.
        """
        if self.slot is not None:
            buffers = self.buffers()
            for buffer, states in zip(buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.slot, states)
            return buffers
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.owners.begin(self.global_length):
            self._append(key_states, value_states)
        self.global_length += key_states.shape[-2]
        if self.is_expanded and self.local_length == 0:
            return torch.zeros_like(key_states[:, :, :1]), torch.zeros_like(value_states[:, :, :1])
        return self.shard()

    def advance(self) -> None:
        """Count one new token that was written to the `slot` behind the last one, on the rank whose turn it is."""
        if self.owners.begin(self.global_length):
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
        kept = self.global_length + tokens_to_remove
        self.local_length -= self.owners.num_stored(kept, self.global_length)
        self.global_length = kept

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
        super().__init__(Owners(rank=0, world_size=1))  # every rank stores as if it were alone
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


def shape_alone(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor that takes the memory of one element."""
    return torch.empty(1, dtype=dtype, device=device).expand(*shape)


def host_like(states: Tensor) -> Tensor:
    """Return a new, contiguous tensor of the same shape and dtype in host memory."""
    return torch.empty(states.shape, dtype=states.dtype)


def first_capacity(num_document: int, num_new: int = 0) -> int:
    """Return for how many tokens a shard's buffers are made; see `ShardedCache`."""
    return _stepped(num_document + max(GROWTH_TOKENS, num_new))


def _stepped(num_tokens: int) -> int:
    return -(-num_tokens // STEP_TOKENS) * STEP_TOKENS


class ShardedCache(Cache):
    """The cache of one context on one rank.

    Parameters
    ----------
    layers : sequence of LayerAttention
        How each layer attends; those with a window are stored on every rank.
    rank, world_size : int
        This rank, and how many share the context.
    shard_tokens : int
        Document tokens that this rank will store, for sizing the buffers.
    new_tokens : int
        Tokens that are expected after the document, on all ranks together, likewise.
    query_tokens : int
        How many of them come first and in one forward, so that one rank stores them, likewise.

    Attributes
    ----------
    attention : the layers, as they were given
    """

    def __init__(
        self,
        layers: Sequence[LayerAttention],
        rank: int,
        world_size: int,
        shard_tokens: int,
        new_tokens: int = 0,
        query_tokens: int = 0,
    ) -> None:
        self.attention = tuple(layers)
        self._owners = Owners(rank, world_size)
        share = min(new_tokens, -(-new_tokens // world_size) + PAGE_TOKENS)
        if self._owners.stores_next(0):
            share = max(share, query_tokens)
        self._sharded_layers: list[ShardedCacheLayer] = []
        for attention in layers:
            if attention.window is None:
                is_expanded = attention.stores and not attention.stores_attended
                layer, num_document, num_new = ShardedCacheLayer(self._owners, is_expanded), shard_tokens, share
            else:
                layer, num_document, num_new = WindowCacheLayer(attention.window), attention.window - 1, new_tokens
            layer.reserve(first_capacity(num_document, num_new))
            self._sharded_layers.append(layer)
        self._storing = [layer for layer, of in zip(self._sharded_layers, layers, strict=True) if of.stores_here]
        self._of_window = {
            of.window: layer for layer, of in zip(self._sharded_layers, layers, strict=True) if of.stores_here
        }
        super().__init__(layers=self._sharded_layers)  # type: ignore[arg-type]

    def layer(self, layer_idx: int) -> ShardedCacheLayer:
        """Return one layer's shard."""
        return self._sharded_layers[layer_idx]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return how many tokens are stored, over all ranks.

        Parameters
        ----------
        layer_idx : by default the first layer that this rank computes
        """
        layer = self._storing[0] if layer_idx is None else self._sharded_layers[layer_idx]
        return layer.get_seq_length()

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
        for layer in self._storing:
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
        num_new : for how many new tokens they must have room, whosever turn it is
        """
        found: list[Tensor] = []
        for layer in self._storing:
            layer.make_room(layer.local_length + num_new)
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

    def shards(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return what is stored on this rank by layer, (1, kv_heads, local_tokens, head_dim) each; views."""
        return {
            layer_idx: layer.shard()
            for layer_idx, layer in enumerate(self._sharded_layers)
            if self.attention[layer_idx].stores_here and layer.local_length > 0
        }

    def room_on_host(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return tensors like `shards` in host memory, to copy them to."""
        return {layer_idx: (host_like(keys), host_like(values)) for layer_idx, (keys, values) in self.shards().items()}

    def room_on_device(self, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
        """Return buffers on a device, with the spare room that is reserved, to copy `shards` to their beginning."""
        room = {}
        for layer_idx, shard in self.shards().items():
            layer = self._sharded_layers[layer_idx]
            layer.reserve(layer.local_length)
            like = [shape_alone(states.shape, states.dtype, device) for states in shard]
            room[layer_idx] = layer.made_buffers(like[0], like[1])
        return room

    def use_copies(self, copies: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Use copies of `shards` as buffers, which frees those in use.

        Nothing can be attended to or stored while they are in host memory.
        """
        for layer_idx, layer in enumerate(self._sharded_layers):
            if layer_idx in copies:
                layer.hold(*copies[layer_idx], num_tokens=layer.local_length)
            else:
                layer.keys = layer.values = None
                layer.is_initialized = False

    @property
    def holds_new(self) -> bool:
        """Whether this rank stores the new tokens of the forward under way, once one of its layers has updated."""
        return self._owners.stored_last

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
        return {
            window: layer.local_length + int(with_next and layer.owners.stores_next(layer.global_length))
            for window, layer in self._of_window.items()
        }
