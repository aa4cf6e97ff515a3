"""Copying a shard between device and host memory: piece by piece, in threads, through a little pinned memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.engine.saved_files import Staging, array_of, in_threads, synchronize

Shards = Mapping[int, tuple[Tensor, Tensor]]
# Small enough that the last pieces keep all threads busy, and large enough for the bus.
PIECE_BYTES = 2**24


@dataclass(frozen=True)
class _Piece:
    """Some tokens of a head, (tokens, channels), contiguous; one of the two lies in host memory."""

    target: Tensor
    source: Tensor

    def run(self, staging: Staging) -> None:
        staged = staging.part(self.source.shape, self.source.dtype)
        if self.source.device.type == "cpu":
            array_of(staged)[...] = array_of(self.source)
            staging.copy(self.target, staged)
        else:
            staging.copy(staged, self.source)
            array_of(self.target)[...] = array_of(staged)


def copy_shards(targets: Shards, sources: Shards, device: torch.device) -> None:
    """Copy each layer's keys and values, (1, kv_heads, tokens, head_dim), to the beginning of others.

    Parameters
    ----------
    device : on which either the targets or the sources are; the others are in host memory
    """
    pieces = []
    for layer_idx, pair in sources.items():
        for target, source in zip(targets[layer_idx], pair, strict=True):
            pieces += _pieces(target[0, :, : source.shape[2]], source[0])
    synchronize(device)
    num_bytes = max((piece.source.numel() * piece.source.element_size() for piece in pieces), default=0)
    staging = Staging(device, num_bytes)
    in_threads(lambda piece: piece.run(staging), pieces)


def _pieces(target: Tensor, source: Tensor) -> list[_Piece]:
    """Cut (kv_heads, tokens, head_dim) into pieces."""
    step = max(1, PIECE_BYTES // (source.shape[2] * source.element_size()))
    return [
        _Piece(target[head, first : first + step], source[head, first : first + step])
        for head in range(source.shape[0])
        for first in range(0, source.shape[1], step)
    ]
