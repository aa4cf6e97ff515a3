"""What one request carries from layer to layer and from round to round, and the tools that the methods work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apb_ds.cache import ShardedCache
from apb_ds.compressors.base import Compressor
from apb_ds.ops.kernels import KernelChoice
from apb_ds.ops.merge import merge_two
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan


@dataclass(frozen=True)
class Tools:
    """What a method works with: the group to talk to, the kernels, the compressor if it has one, and how to merge."""

    group: SequenceGroup
    kernels: KernelChoice
    compressor: Compressor | None
    merge_two: Callable[..., Tensor] = merge_two
    fused: bool = False  # whether what is elementwise is compiled


class PassedStates:
    """Keys and values that blocks see besides their own, in one layer: ``[anchor | C_0 | C_1 | ...]``.

    One buffer in document order, so that what a host sees is one contiguous slice of tokens: the anchor and every
    compressed block before its own.
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        _, kv_heads, _, head_dim = like.shape
        # The last host's compressed block is passed to nobody.
        self._capacity = plan.anchor_length + plan.kept_offsets[plan.hosts - 1]
        self._buffer = like.new_empty((2, kv_heads, self._capacity, head_dim))
        self.anchor_queries: Tensor | None = None

    def place(self, start: int, keys_values: Tensor) -> None:
        """Put (2, kv_heads, tokens, head_dim), keys first, at token `start`."""
        self._buffer[:, :, start : start + keys_values.shape[2]] = keys_values

    def place_pair(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (1, kv_heads, tokens, head_dim) each, at token `start`."""
        stop = start + keys.shape[2]
        self._buffer[0:1, :, start:stop] = keys
        self._buffer[1:2, :, start:stop] = values

    def first(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first tokens, (1, kv_heads, num_tokens, head_dim) each; views."""
        return self._buffer[0:1, :, :num_tokens], self._buffer[1:2, :, :num_tokens]


@dataclass
class PrefillState:
    """The state of one prefill on one rank.

    Attributes
    ----------
    plan : how the request is split
    cache : where this rank's blocks go
    rank : this rank
    round_index : the round under way; the engine advances it
    projections : what the layer under way has projected of this rank's tokens, before rotation: (1, tokens, channels)
        each, queries, keys and values in this order or in one tensor. Whoever calls the attention sets it, where the
        compressor `needs_projections` and `needs_scores`; the method takes it, so that it lives no longer than needed.
    progress : called as ``progress(done, total)`` after each layer of each round
    """

    plan: Plan
    cache: ShardedCache
    rank: int = 0
    round_index: int = 0
    progress: Callable[[int, int], None] | None = None
    projections: Sequence[Tensor] | None = None
    _layers_done: int = 0
    _passed: dict[int, PassedStates] = field(default_factory=dict)

    @property
    def host(self) -> int:
        """The host that this rank serves in this round."""
        return self.plan.rounds[self.round_index][self.rank]

    @property
    def anchor_share(self) -> tuple[int, int]:
        """The anchor span that this rank computes in this round."""
        return self.plan.anchor_share(self.rank, self.round_index)

    @property
    def is_last_round(self) -> bool:
        return self.round_index == len(self.plan.rounds) - 1

    def is_last_layer(self, layer_idx: int) -> bool:
        return layer_idx == len(self.cache.layers) - 1

    def needs_scores(self, layer_idx: int) -> bool:
        """Whether the tokens of this rank's block are scored in this layer and round."""
        return not self.is_last_layer(layer_idx) and self.plan.is_scored(self.host)

    def take_projections(self) -> Tensor | None:
        """Return `projections` of the block alone as one tensor, (1, block_tokens, channels), and let go of them."""
        parts, self.projections = self.projections, None
        if parts is None:
            return None
        start, stop = self.anchor_share
        of_block = [part[:, stop - start :] for part in parts]
        return of_block[0] if len(of_block) == 1 else torch.cat(of_block, dim=-1)

    def passed(self, layer_idx: int, like: Tensor) -> PassedStates:
        """Return the layer's buffer, made at first use with the shape, dtype and device of keys like these."""
        if layer_idx not in self._passed:
            self._passed[layer_idx] = PassedStates(self.plan, like)
        return self._passed[layer_idx]

    def finish_layer(self, layer_idx: int) -> None:
        """Free the layer's buffer after the last round, and report progress."""
        if self.is_last_round:
            self._passed.pop(layer_idx, None)
        self._layers_done += 1
        if self.progress is not None:
            self.progress(self._layers_done, len(self.plan.rounds) * len(self.cache.layers))
