"""Bringing whole layers together just in time: while one computes, the next one's weights are on their way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.pending import PendingGather
from apb_ds.weights.layers import ShardedLinear


class Gatherer:
    """Gathers the weights of decoder layers, in order, into two buffers that take turns.

    All ranks call its methods at the same places. Outside of `gathering` it holds no memory.

    Parameters
    ----------
    layers : the sharded linear layers of each decoder layer, by its index
    group : for these messages alone, so that they do not delay others

    Attributes
    ----------
    group : as given
    """

    def __init__(self, layers: Mapping[int, Sequence[ShardedLinear]], group: SequenceGroup) -> None:
        self._layers = layers
        self.group = group
        self._buffers: list[dict[torch.dtype, Tensor]] = []
        self._order: list[int] = []  # the layers that are still to be gathered
        self._entered: int | None = None
        self._pending: tuple[int, list[tuple[ShardedLinear, PendingGather]]] | None = None
        self._num_started = 0

    @contextmanager
    def gathering(self, layers: Sequence[int]) -> Iterator[None]:
        """Gather these layers in this order, for as long as the context lasts; the first one at once."""
        self._order = list(layers)
        self._buffers = [self._new_buffer() for _ in range(2)]
        self._num_started = 0
        try:
            self.start_next()
            yield
        finally:
            self._release()
            pending, self._pending = self._pending, None
            for _, gather in pending[1] if pending is not None else []:
                gather.wait()  # its buffer is about to be freed
            self._order, self._buffers = [], []

    @property
    def is_gathering(self) -> bool:
        return bool(self._buffers)

    def enter(self, layer_idx: int) -> None:
        """Have a layer compute with whole weights; the one before it no longer does."""
        self.start_next()  # where the layer before did not
        if self._pending is None or self._pending[0] != layer_idx:
            raise RuntimeError(f"layer {layer_idx} is not the one whose weights are gathered next.")
        self._release()
        for linear, gather in self._pending[1]:
            joined = gather.wait().flatten(0, 1)
            linear.whole = joined[: linear.out_features]
        self._entered, self._pending = layer_idx, None

    def start_next(self) -> None:
        """Start to gather the layer after the one that was entered last, if there is one."""
        if not self._order or self._pending is not None:
            return
        layer_idx = self._order.pop(0)
        buffer = self._buffers[self._num_started % len(self._buffers)]
        self._num_started += 1
        offsets = dict.fromkeys(buffer, 0)
        started = []
        for linear in self._layers[layer_idx]:
            dtype, size = linear.weight.dtype, linear.weight.numel() * self.group.world_size
            into = buffer[dtype][offsets[dtype] : offsets[dtype] + size].view(-1, linear.in_features)
            offsets[dtype] += size
            started.append((linear, self.group.start_all_gather(linear.weight.detach(), into)))
        self._pending = layer_idx, started

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Have all layers compute in place in this context, also while one of them is whole."""
        entered, self._entered = self._entered, None
        wholes = [linear.whole for linear in self._linears_of(entered)]
        for linear in self._linears_of(entered):
            linear.whole = None
        try:
            yield
        finally:
            for linear, whole in zip(self._linears_of(entered), wholes, strict=True):
                linear.whole = whole
            self._entered = entered

    def _release(self) -> None:
        for linear in self._linears_of(self._entered):
            linear.whole = None
        self._entered = None

    def _linears_of(self, layer_idx: int | None) -> Sequence[ShardedLinear]:
        return () if layer_idx is None else self._layers[layer_idx]

    def _new_buffer(self) -> dict[torch.dtype, Tensor]:
        """Return room for the largest layer, by dtype."""
        sizes: dict[torch.dtype, int] = {}
        for linears in self._layers.values():
            of_layer: dict[torch.dtype, int] = {}
            for linear in linears:
                size = linear.weight.numel() * self.group.world_size
                of_layer[linear.weight.dtype] = of_layer.get(linear.weight.dtype, 0) + size
            for dtype, size in of_layer.items():
                sizes[dtype] = max(sizes.get(dtype, 0), size)
        device = next(linear.weight.device for linears in self._layers.values() for linear in linears)
        return {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
