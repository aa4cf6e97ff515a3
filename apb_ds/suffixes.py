"""What follows a document in a pack: the keys and values of many sequences at once, in slots on all ranks.

A sequence is a prefix, a context as it was when the sequence began, and a suffix, the tokens after it. Prefixes do not
change, so any number of sequences share one. Suffixes lie in slots of slabs, apart from the document: they grow, move
and are freed without touching it. A short document that nobody shares can be copied into the suffix instead.

In layers without a window, each forward's new tokens of a sequence are stored on one rank, a page each in turn: the
next is the rank that stores least of the sequence. Sequences begin on different ranks. In layers with a window every
rank stores them, as far as the window reaches back. All ranks make, copy and free the same suffixes in the same order,
so all of them know who stores what.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.cache import PAGE_TOKENS, ShardedCache, WindowCacheLayer
from apb_ds.utils.sizes import LayerAttention

SMALLEST_SLOT = 256  # tokens; the capacities are this, times two, times four and so on

KeysAndValues = tuple[Tensor, Tensor]


class Prefix:
    """A context's tokens at one time: this rank's shard, which must not change any more.

    Parameters
    ----------
    layers : how each layer attends
    cache : the context's, which is kept alive; None for no tokens at all

    Attributes
    ----------
    num_tokens : global
    """

    def __init__(self, layers: Sequence[LayerAttention], cache: ShardedCache | None = None) -> None:
        self._cache = cache
        self.num_tokens = 0 if cache is None else cache.get_seq_length()
        self._states: dict[int, KeysAndValues] = {}
        if cache is None:
            return
        for layer_idx, attention in enumerate(layers):
            layer = cache.layer(layer_idx)
            if not attention.stores_here or layer.local_length == 0:
                continue
            keys, values = layer.shard()
            if isinstance(layer, WindowCacheLayer):  # copied: a later turn of the context moves them
                reach = layer.window - 1
                keys, values = (states[:, :, max(0, layer.local_length - reach) :].clone() for states in (keys, values))
                if reach == 0:
                    continue
            self._states[layer_idx] = keys, values

    def states(self, layer_idx: int) -> KeysAndValues | None:
        """Return the keys and values of a layer that stores them, (1, kv_heads, local_tokens, head_dim) each.

        None if this rank has none. With a window: the last ``window - 1`` tokens, the same on every rank.
        """
        return self._states.get(layer_idx)


@dataclass(frozen=True)
class CopiedDocument:
    """A document whose tokens a suffix begins with.

    Attributes
    ----------
    prefix : this rank's shard
    stored : tokens of each rank's shard, in layers without a window
    """

    prefix: Prefix
    stored: tuple[int, ...]


class Slab:
    """Slots of one capacity, for layers that store the same tokens. One slot more than is given out is scratch.

    Parameters
    ----------
    layers : by index, those with one window, or with none
    capacity : tokens of a slot
    """

    def __init__(self, layers: dict[int, LayerAttention], capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._layers = layers
        self._device = device
        self._free: list[int] = []
        self.num_slots = 0
        self._buffers: dict[int, KeysAndValues] = {}

    @property
    def scratch(self) -> int:
        """The slot into which anything may be written."""
        return self.num_slots

    @property
    def is_unused(self) -> bool:
        return len(self._free) == self.num_slots

    @property
    def num_bytes(self) -> int:
        return sum(states.numel() * states.element_size() for pair in self._buffers.values() for states in pair)

    def take(self) -> int:
        """Return the lowest free slot; memory may run out, and nothing is changed then."""
        if not self._free:
            self._grow(max(1, 2 * self.num_slots))
        return heapq.heappop(self._free)

    def free(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def buffers(self, layer_idx: int) -> KeysAndValues:
        """Return a layer's keys and values, (slots + 1, capacity, kv_heads, head_dim) each."""
        return self._buffers[layer_idx]

    def _grow(self, num_slots: int) -> None:
        grown = {}
        for layer_idx, layer in self._layers.items():
            # Zeros: kernels read whole tiles, and what is masked must still be finite.
            made = [
                torch.zeros((num_slots + 1, self.capacity, *shape), dtype=layer.dtype, device=self._device)
                for shape in layer.stored_shapes
            ]
            for new, old in zip(made, self._buffers.get(layer_idx, ()), strict=False):
                new[: self.num_slots] = old[: self.num_slots]
            grown[layer_idx] = made[0], made[1]
        self._buffers = grown
        for slot in range(self.num_slots, num_slots):
            heapq.heappush(self._free, slot)
        self.num_slots = num_slots


@dataclass
class _Place:
    """Where a suffix is stored on this rank, for layers of one kind."""

    slab: Slab
    slot: int
    length: int = 0


@dataclass(frozen=True)
class Shares:
    """How a suffix is shared between the ranks in layers without a window; the same on every rank.

    No rank stores more than another by a page and a forward or more.

    Attributes
    ----------
    stored : tokens of each rank
    owner : the rank that stores the next forward's
    in_page : tokens that it has stored since its turn began
    """

    stored: tuple[int, ...]
    owner: int
    in_page: int = 0

    def after(self, forwards: Iterable[int]) -> Shares:
        """Return the shares after forwards of so many tokens each."""
        stored, owner, in_page = list(self.stored), self.owner, self.in_page
        for num_tokens in forwards:
            stored[owner] += num_tokens
            in_page += num_tokens
            if in_page >= PAGE_TOKENS:
                owner, in_page = _least(stored, owner + 1), 0
        return Shares(tuple(stored), owner, in_page)


class Suffix:
    """One sequence's tokens after its prefix. Made, copied and freed by a `SuffixPool`.

    Attributes
    ----------
    number : no other suffix of the pool ever has it
    num_tokens : global; a forward's tokens count once it went well
    shares : which rank stores how many of them, in layers without a window
    places : by `LayerAttention.window`, where this rank stores its part
    """

    def __init__(self, shares: Shares, number: int = -1) -> None:
        self.number = number
        self.num_tokens = 0
        self.shares = shares
        self.places: dict[int | None, _Place] = {}

    @property
    def owner(self) -> int:
        """The rank that stores the next forward's tokens in layers without a window."""
        return self.shares.owner


class SuffixPool:
    """All suffixes of one engine on one rank.

    Parameters
    ----------
    layers : how each layer attends
    rank, world_size : of the group that shares a request
    device : where keys and values are

    Attributes
    ----------
    nothing : the prefix without tokens
    """

    def __init__(self, layers: Sequence[LayerAttention], rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self.nothing = Prefix(layers)
        self._kinds: dict[int | None, dict[int, LayerAttention]] = {}
        for layer_idx, layer in enumerate(layers):
            if layer.stores_here:
                self._kinds.setdefault(layer.window, {})[layer_idx] = layer
        # Of all stages, so that all ranks count the same: by stage and window, bytes of a token.
        self._token_bytes: dict[int, dict[int | None, int]] = {}
        for layer in layers:
            if layer.stores:
                of_stage = self._token_bytes.setdefault(layer.stage, {})
                of_stage[layer.window] = of_stage.get(layer.window, 0) + _bytes_of_token(layer)
        self._slabs: dict[tuple[int | None, int], Slab] = {}
        self._num_made = 0
        self._abandoned: list[Suffix] = []

    def new(
        self, forwards: Sequence[int], source: Suffix | None = None, document: CopiedDocument | None = None
    ) -> Suffix:
        """Return a suffix with room: an empty one, or a copy.

        Parameters
        ----------
        forwards : how many tokens each of the coming forwards has
        source : what to copy
        document : whose tokens to copy; the sequence then has `nothing` for its prefix. Not with a `source`.

        Raises
        ------
        torch.OutOfMemoryError
            On the rank that runs out of memory; nothing is changed then.
        """
        while self._abandoned:
            self.free(self._abandoned.pop())
        number = self._num_made
        self._num_made += 1  # also if memory runs out, which other ranks may not notice
        suffix = self._counted(number, source, None if document is None else document.stored)
        try:
            for window in self._kinds:
                before = None if source is None else source.places[window]
                if before is not None and window is not None:
                    _forget_unreachable(before, window)
                needed = self._needed(window, suffix, forwards)[self.rank]
                place = suffix.places[window] = self._take(window, needed)
                if before is not None:
                    self._copy(window, before, place)
                if document is not None:
                    self._copy_document(window, document.prefix, place)
        except BaseException:
            self.free(suffix)
            raise
        return suffix

    def free(self, suffix: Suffix) -> None:
        """Free a suffix; it must not be used any more. Freeing twice does nothing."""
        for place in suffix.places.values():
            place.slab.free(place.slot)
        suffix.places = {}
        self._drop_unused()

    def padding(self, like: Suffix) -> Suffix:
        """Return an empty suffix in the scratch slots of the same slabs; it is not to be counted or freed.

        A token that is fed to it is stored there, where it sees itself alone.
        """
        suffix = Suffix(Shares((), owner=self.rank))
        suffix.places = {window: _Place(place.slab, place.slab.scratch) for window, place in like.places.items()}
        return suffix

    def abandon(self, suffix: Suffix) -> None:
        """Free a suffix at the next call that makes one; for finalizers, which may run at any moment."""
        self._abandoned.append(suffix)

    def trim(self) -> None:
        """Free the slabs that no suffix uses."""
        while self._abandoned:
            self.free(self._abandoned.pop())
        self._slabs = {key: slab for key, slab in self._slabs.items() if not slab.is_unused}

    def make_room(self, suffix: Suffix, num_tokens: int) -> None:
        """Make room for the next forward's tokens, which is there already unless more came than were announced."""
        for window, place in suffix.places.items():
            if window is None and suffix.owner != self.rank:
                continue
            if place.length + num_tokens > place.slab.capacity and window is not None:
                _forget_unreachable(place, window)
            if place.length + num_tokens > place.slab.capacity:
                self._move(suffix, window, place.length + num_tokens)

    def count(self, suffix: Suffix, num_tokens: int) -> None:
        """Count the tokens of a forward that went well."""
        for window, place in suffix.places.items():
            if window is not None or suffix.owner == self.rank:
                place.length += num_tokens
        suffix.num_tokens += num_tokens
        suffix.shares = suffix.shares.after([num_tokens])

    def bytes_for(
        self, forwards: Sequence[int], source: Suffix | None = None, stored: Sequence[int] | None = None
    ) -> int:
        """Return the most bytes that a rank needs for what `new` returns.

        Parameters
        ----------
        forwards, source : as in `new`
        stored : `CopiedDocument.stored`
        """
        suffix = self._counted(0, source, stored)
        return max(
            sum(_capacity(max(self._needed(window, suffix, forwards))) * size for window, size in of_stage.items())
            for of_stage in self._token_bytes.values()
        )

    def document_bytes(self, num_tokens: int) -> int:
        """Return the bytes of a document of which a rank stores so many tokens, in the stage that stores most."""
        return max(
            sum((num_tokens if window is None else window - 1) * size for window, size in of_stage.items())
            for of_stage in self._token_bytes.values()
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all slabs on this rank."""
        return sum(slab.num_bytes for slab in self._slabs.values())

    def _counted(self, number: int, source: Suffix | None, stored: Sequence[int] | None) -> Suffix:
        """Return a suffix that counts what will be copied into it, without places."""
        if source is not None:
            suffix = Suffix(source.shares, number)
            suffix.num_tokens = source.num_tokens
            return suffix
        stored = (0,) * self.world_size if stored is None else tuple(stored)
        suffix = Suffix(Shares(stored, number % self.world_size), number)
        suffix.num_tokens = sum(stored)
        return suffix

    def _needed(self, window: int | None, suffix: Suffix, forwards: Sequence[int]) -> Sequence[int]:
        """Return how many tokens of a suffix each rank will store after some forwards."""
        if window is not None:
            kept = min(suffix.num_tokens, window - 1)
            most = min(kept + sum(forwards), window - 1 + max(max(forwards, default=0), PAGE_TOKENS))
            return [most] * self.world_size
        if self.world_size == 1:
            return [suffix.num_tokens + sum(forwards)]
        return suffix.shares.after(forwards).stored

    def _take(self, window: int | None, num_tokens: int) -> _Place:
        key = window, _capacity(num_tokens)
        slab = self._slabs.get(key)
        if slab is None:
            slab = Slab(self._kinds[window], key[1], self._device)
        place = _Place(slab, slab.take())
        self._slabs[key] = slab
        return place

    def _move(self, suffix: Suffix, window: int | None, num_tokens: int) -> None:
        before = suffix.places[window]
        place = self._take(window, num_tokens)
        self._copy(window, before, place)
        suffix.places[window] = place
        before.slab.free(before.slot)
        self._drop_unused()

    def _copy(self, window: int | None, source: _Place, target: _Place) -> None:
        target.length = source.length
        for layer_idx in self._kinds[window]:
            pairs = zip(target.slab.buffers(layer_idx), source.slab.buffers(layer_idx), strict=True)
            for new, old in pairs:
                new[target.slot, : source.length] = old[source.slot, : source.length]

    def _copy_document(self, window: int | None, prefix: Prefix, target: _Place) -> None:
        for layer_idx in self._kinds[window]:
            copied = prefix.states(layer_idx)
            if copied is None:
                continue
            target.length = copied[0].shape[2]
            for new, old in zip(target.slab.buffers(layer_idx), copied, strict=True):
                new[target.slot, : target.length] = old[0].transpose(0, 1)

    def _drop_unused(self) -> None:
        """Free the slabs that no suffix uses, but for the smallest, which the next ones will want."""
        unused = [key for key, slab in self._slabs.items() if slab.is_unused and slab.capacity > SMALLEST_SLOT]
        for key in unused:
            del self._slabs[key]


def _bytes_of_token(layer: LayerAttention) -> int:
    itemsize = (layer.dtype or torch.get_default_dtype()).itemsize
    return sum(heads * channels * itemsize for heads, channels in layer.stored_shapes)


def _forget_unreachable(place: _Place, window: int) -> None:
    """Drop the tokens that no later one sees, in a layer with a window."""
    kept = window - 1
    if place.length <= kept:
        return
    for layer_idx in place.slab._layers:
        for states in place.slab.buffers(layer_idx):
            slot = states[place.slot]
            slot[:kept] = slot[place.length - kept : place.length].clone()
    place.length = kept


def _least(stored: Sequence[int], first: int) -> int:
    """Return the rank that stores least; of several, the first from `first` on, around."""
    ranks = ((first + step) % len(stored) for step in range(len(stored)))
    return min(ranks, key=lambda rank: stored[rank])


def _capacity(num_tokens: int) -> int:
    capacity = SMALLEST_SLOT
    while capacity < num_tokens:
        capacity *= 2
    return capacity
