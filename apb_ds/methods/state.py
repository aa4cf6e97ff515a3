"""What a prefill carries from layer to layer and from round to round, and the tools that the methods work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from apb_ds.cache import ShardedCache
from apb_ds.methods.halo import Halo
from apb_ds.methods.passed import OwnStates, PassedStates, SentStates
from apb_ds.ops.kernels import Kernel, KernelChoice
from apb_ds.ops.merge import merge_two, with_sinks
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan
from apb_ds.utils.sizes import num_prefilled

States = Sequence[Tensor]  # queries, keys and values of the same tokens
Part = tuple[Tensor, Tensor]  # an output of attention to some of the keys, and its log-sum-exp


@dataclass(frozen=True)
class Tools:
    """What a method computes a layer with.

    Attributes
    ----------
    group : the ranks that share the request
    kernels : attention kernels for the phases
    scale : factor on the attention logits
    softcap : bound of the logits after that; None without
    sinks : (heads,), logits of one more key per head, whose value is zero; None without
    merge_two : merges two partial outputs by their log-sum-exps
    fused : whether elementwise work is compiled
    """

    group: SequenceGroup
    kernels: KernelChoice
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    merge_two: Callable[..., Tensor] = merge_two
    fused: bool = False

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, *, kernel: Kernel | None = None) -> Part:
        """Attend to all keys; see `Kernel` for shapes."""
        return (kernel or self.kernels.prefill)(query, keys, values, False, self.scale, softcap=self.softcap)

    def attend_causally(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None = None) -> Part:
        """Attend causally, and to the sinks, of which a token's softmax has one: so once for each query.

        Parameters
        ----------
        window : as in `Kernel`, which then takes more keys than queries
        """
        return self.with_sinks(
            self.kernels.prefill(query, keys, values, True, self.scale, window=window, softcap=self.softcap)
        )

    def with_sinks(self, part: Part) -> Part:
        """Count the sinks among the keys of a partial output."""
        return part if self.sinks is None else with_sinks(*part, self.sinks)

    def of_own_heads(self) -> Tools:
        """Return the tools for this rank's share of the heads."""
        if self.sinks is None:
            return self
        return replace(self, sinks=self.sinks.chunk(self.group.world_size)[self.group.rank])


class LayerWeights(Protocol):
    """Weights that are brought together layer by layer; see `apb_ds.weights`."""

    def enter(self, layer_idx: int) -> None:
        """Have a layer compute with whole weights."""

    def start_next(self) -> None:
        """Start to bring the next layer's together."""


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
    given_to_cache : what the model gave its cache in this layer, (1, kv_heads, tokens, channels) each, for the same
        tokens; None for the keys and values that are attended to. Taken likewise.
    progress : called as ``progress(done, total)`` after each layer of each round
    weights : what brings the layers' weights together, or None where each rank has all of them
    """

    plan: Plan
    cache: ShardedCache
    rank: int = 0
    round_index: int = 0
    progress: Callable[[int, int], None] | None = None
    weights: LayerWeights | None = None
    projections: Sequence[Tensor] | None = None
    given_to_cache: Part | None = None
    _layers_done: int = 0
    _passed: dict[int, PassedStates] = field(default_factory=dict)
    _halos: dict[int, Halo] = field(default_factory=dict)

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

    @cached_property
    def num_layers(self) -> int:
        """How many layers a prefill computes, on all stages of a pipeline together."""
        return num_prefilled(self.cache.attention)

    @cached_property
    def layers(self) -> list[int]:
        """The layers that this rank computes, in order."""
        return [layer_idx for layer_idx in range(self.num_layers) if self.cache.attention[layer_idx].is_here]

    def is_last_layer(self, layer_idx: int) -> bool:
        return layer_idx == self.num_layers - 1

    def needs_scores(self, layer_idx: int) -> bool:
        """Whether the tokens of any of this rank's blocks are scored in this layer and round."""
        if self.is_last_layer(layer_idx) or self.cache.attention[layer_idx].window is not None:
            return False
        return any(self.plan.is_scored(host) for host in self.hosts)

    @property
    def lengths(self) -> list[int]:
        """Lengths of what the rank's forward consists of: its share of the anchor, the blocks, ulysses' padding."""
        start, stop = self.anchor_share
        blocks = (self.plan.block_length(host) for host in self.hosts)
        return [stop - start, *blocks, self.plan.padding_length(self.rank)]

    def store_blocks(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Cache this rank's blocks of the round; the write path of prefill.

        What the layer sends to other ranks is under way by then, so the next layer's weights follow it.

        Parameters
        ----------
        keys, values : (1, kv_heads, tokens, head_dim) of all the forward's tokens; what the model gave its cache is
            stored in place of them
        """
        given, self.given_to_cache = self.given_to_cache, None
        first, *blocks, _ = self.lengths
        if sum(blocks) and self.cache.attention[layer_idx].stores:
            span = slice(first, first + sum(blocks))
            self.cache.layer(layer_idx).store_block(*(states[:, :, span] for states in given or (keys, values)))
        self.start_next_weights()

    def start_next_weights(self) -> None:
        """Start to bring the next layer's weights together, behind what this layer sends."""
        if self.weights is not None:
            self.weights.start_next()

    def store_tail(self, layer_idx: int, tail: Tensor) -> None:
        """Cache what a window still reaches after the document: keys and values, (2, kv_heads, tokens, head_dim).

        The narrower of them comes padded.
        """
        attention = self.cache.attention[layer_idx]
        if attention.stores:
            self.cache.layer(layer_idx).store_block(
                tail[0:1, ..., : attention.head_dim], tail[1:2, ..., : attention.value_dim]
            )

    def take_from_cache(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Take what the model gives its cache, before the layer's attention is called."""
        self.given_to_cache = keys, values

    def take_projections(self) -> list[tuple[Tensor, ...] | None]:
        """Return the `projections` of each block, views of (1, block_tokens, channels) each, and release them."""
        parts, self.projections = self.projections, None
        if parts is None:
            return [None] * len(self.hosts)
        return list(zip(*(part.split(self.lengths, dim=1)[1:-1] for part in parts), strict=True))

    def passed(self, layer_idx: int, like: Tensor, fused: bool = False) -> PassedStates:
        """Return what the layer passes on, made at first use for keys of such shape, dtype and device.

        Parameters
        ----------
        fused : whether states are gathered in one kernel
        """
        if layer_idx not in self._passed:
            attention = self.cache.attention[layer_idx]
            is_equally_wide = attention.value_dim == attention.head_dim
            reads_cache = self.plan.world_size == 1 and attention.stores_attended and is_equally_wide
            self._passed[layer_idx] = (
                OwnStates(self.plan, self.cache.layer(layer_idx), like, fused)
                if reads_cache
                else SentStates(self.plan, like)
            )
        return self._passed[layer_idx]

    def halo(self, layer_idx: int, like: Tensor, window: int) -> Halo:
        """Return what blocks see of earlier ones in a layer with a window, made at first use for such keys."""
        if layer_idx not in self._halos:
            self._halos[layer_idx] = Halo(self.plan, window, like)
        return self._halos[layer_idx]

    def finish_layer(self, layer_idx: int) -> None:
        """Free what the layer passed on after the last round, and report progress."""
        if self.is_last_round:
            self._passed.pop(layer_idx, None)
            self._halos.pop(layer_idx, None)
        self._layers_done += 1
        if self.progress is not None:
            self.progress(self._layers_done, len(self.plan.rounds) * self.num_layers)
