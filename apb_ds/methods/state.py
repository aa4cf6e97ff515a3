"""What a prefill carries from layer to layer and from round to round, and the tools that the methods work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from apb_ds.cache import ShardedCache
from apb_ds.methods.passed import OwnStates, PassedStates, SentStates
from apb_ds.ops.kernels import KernelChoice
from apb_ds.ops.merge import merge_two
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan


@dataclass(frozen=True)
class Tools:
    """What a method computes a layer with.

    Attributes
    ----------
    group : the ranks that share the request
    kernels : attention kernels for the phases
    scale : factor on the attention logits
    merge_two : merges two partial outputs by their log-sum-exps
    fused : whether elementwise work is compiled
    """

    group: SequenceGroup
    kernels: KernelChoice
    scale: float
    merge_two: Callable[..., Tensor] = merge_two
    fused: bool = False


@dataclass
class PrefillState:
    """The state of one prefill on one rank.

    Attributes
    ----------
    plan : how the request is split
    cache : where this rank's blocks go
    rank : this rank
    round_index : the round under way
    projections : the layer's projections of this rank's tokens before rotation, (1, tokens, channels) each: queries,
        keys and values in this order, or one tensor. The caller of the attention sets it where the compressor
        `needs_projections` and `needs_scores`; the method takes it, so that it lives no longer than needed.
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

    def start_round(self, round_index: int) -> None:
        """Begin a round; rounds come in order."""
        self.round_index = round_index

    @property
    def hosts(self) -> tuple[int, ...]:
        """The hosts that this rank serves in this round, in document order."""
        return self.plan.served(self.rank, self.round_index)

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
        """Whether the tokens of any of this rank's blocks are scored in this layer and round."""
        return not self.is_last_layer(layer_idx) and any(self.plan.is_scored(host) for host in self.hosts)

    def store_block(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Cache this rank's blocks of the round, (1, kv_heads, block_tokens, head_dim) each; the write path of prefill.

        Without a token nothing is stored.
        """
        if keys.shape[2]:
            self.cache.layer(layer_idx).store_block(keys, values)

    def take_projections(self) -> list[tuple[Tensor, ...] | None]:
        """Return the `projections` of each block, views of (1, block_tokens, channels) each, and release them."""
        parts, self.projections = self.projections, None
        if parts is None:
            return [None] * len(self.hosts)
        start, stop = self.anchor_share
        lengths = [stop - start, *(self.plan.block_length(host) for host in self.hosts)]
        return list(zip(*(part.split(lengths, dim=1)[1:] for part in parts), strict=True))

    def passed(self, layer_idx: int, like: Tensor, fused: bool = False) -> PassedStates:
        """Return what the layer passes on, made at first use for keys of such shape, dtype and device.

        Parameters
        ----------
        fused : whether states are gathered in one kernel
        """
        if layer_idx not in self._passed:
            is_alone = self.plan.world_size == 1
            own = self.cache.layer(layer_idx)
            self._passed[layer_idx] = (
                OwnStates(self.plan, own, like, fused) if is_alone else SentStates(self.plan, like)
            )
        return self._passed[layer_idx]

    def finish_layer(self, layer_idx: int) -> None:
        """Free what the layer passed on after the last round, and report progress."""
        if self.is_last_round:
            self._passed.pop(layer_idx, None)
        self._layers_done += 1
        if self.progress is not None:
            self.progress(self._layers_done, len(self.plan.rounds) * len(self.cache.layers))
