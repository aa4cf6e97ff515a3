"""APB as a layer: an attention module like DeepSpeed's ``DistributedAttention``."""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apb_ds.compressors import build_compressor
from apb_ds.compressors.base import Compressor
from apb_ds.compressors.retaining_heads import RetainingHeads, RetainingHeadsCompressor
from apb_ds.config import APBConfig, BlockSettings
from apb_ds.methods import apb, dense, packed, ring, ulysses
from apb_ds.methods import window as sliding
from apb_ds.methods.decode import attend_shards, attend_window, merge_ranks
from apb_ds.methods.packed import Pack
from apb_ds.methods.state import PrefillState, Tools
from apb_ds.ops import profiling
from apb_ds.ops.compiled import can_compile
from apb_ds.ops.kernels import KernelChoice, check_kernel_name, choose_kernels
from apb_ds.ops.merge import merge_two, merge_two_fused
from apb_ds.parallel.groups import SequenceGroup

EXACT_PREFILLS = {"dense": dense.prefill, "ring": ring.prefill, "ulysses": ulysses.prefill}


class Phase(enum.Enum):
    """What a forward is for. The caller passes it; it is never guessed from a tensor's length."""

    PREFILL = "prefill"  # blocks of the document, and in the first round a share of the anchor
    QUERY = "query"  # any number of new tokens over the sharded cache
    DECODE = "decode"  # one new token over the sharded cache
    PACKED = "pack"  # new tokens of several sequences, each over its own document


class APBAttention(nn.Module):
    """Attention over a document that is spread over the ranks of a group.

    One instance serves all layers of a model. It has no parameters.

    Parameters
    ----------
    config : APBConfig
    group : SequenceGroup, torch ProcessGroup or None
        The ranks that share the document; None for this process alone.
    retaining_heads : RetainingHeads, optional
        For ``compressor="retaining_heads"``, on the tensors' device and in their dtype. The caller then sets
        `PrefillState.projections` before each layer.

    Raises
    ------
    ValueError, RuntimeError
        For a compressor or kernel that is unknown or not installed.
    """

    def __init__(self, config: APBConfig, group: Any = None, retaining_heads: RetainingHeads | None = None) -> None:
        super().__init__()
        self.config = config
        if group is None:
            group = SequenceGroup()
        self.group: SequenceGroup = group if isinstance(group, SequenceGroup) else SequenceGroup.of(group)
        check_available(config)
        settings = config.settings
        self.compressor: Compressor | None = None
        if isinstance(settings, BlockSettings):
            self.compressor = build_compressor(settings)
            if isinstance(self.compressor, RetainingHeadsCompressor):
                self.compressor.heads = retaining_heads
        self._choices: dict[tuple[torch.device, torch.dtype, int, bool, bool], KernelChoice] = {}

    @property
    def needs_query(self) -> bool:
        """Whether the compressor scores with the query, which must then be known at prefill."""
        return self.compressor is not None and self.compressor.needs_anchor_queries

    @property
    def needs_projections(self) -> bool:
        """Whether the compressor scores queries, keys and values from before rotation."""
        return self.compressor is not None and self.compressor.needs_projections

    def check_heads(self, heads: int, kv_heads: int) -> None:
        """Raise ValueError if the method cannot share so many heads over the ranks."""
        if self.config.settings.method == "ulysses":
            ulysses.check_heads(heads, kv_heads, self.group.world_size)

    def kernels_for(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, *, window: bool = False, softcap: bool = False
    ) -> KernelChoice:
        """Return the kernels for such tensors; they are chosen on first use.

        Parameters
        ----------
        window, softcap : whether the layer attends within a window, or caps its logits
        """
        case = (device, dtype, head_dim, window, softcap)
        if case not in self._choices:
            name = self.config.settings.kernel
            self._choices[case] = choose_kernels(name, device, dtype, head_dim, window=window, softcap=softcap)
        return self._choices[case]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        phase: Phase,
        layer_idx: int,
        state: PrefillState | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        num_keys: Tensor | None = None,
        holds_new: bool | None = None,
        pack: Pack | None = None,
    ) -> Tensor:
        """Attend for this rank's tokens.

        Parameters
        ----------
        query : (1, heads, tokens, head_dim), rotated
            In PREFILL local: the rank's share of the anchor, then the blocks of its hosts. Otherwise the new tokens,
            the same on every rank.
        key : (1, kv_heads, keys, head_dim), rotated, local
            In PREFILL of the same tokens as `query`. Otherwise the rank's shard, as `ShardedCache.update` returned it.
        value : (1, kv_heads, keys, value_dim), local
        state : PrefillState
            The request's state; needed in PREFILL.
        scale : float
            Factor on the logits; by default ``head_dim ** -0.5``.
        window : int
            How many tokens a token sees, itself included. Such a layer is exact with every method.
        softcap : float
            Bound of the logits: they become ``softcap * tanh(logits / softcap)``.
        sinks : (heads,)
            Logits of one more key per head, whose value is zero.
        num_keys : (1,), int32, on the device
            In DECODE: how many of the first keys count, at least one. For a step that is recorded as a CUDA graph.
        holds_new : bool
            In QUERY and DECODE, needed with several ranks unless `window` or `num_keys` is given: whether this rank
            stores the new tokens, as `ShardedCache.holds_new` says after the update.
        pack : Pack
            The sequences; needed in PACKED, where `key` and `value` are what `Pack.store` returned, or made of it.

        Returns
        -------
        (1, heads, tokens, value_dim) in ``query.dtype``: local in PREFILL (zeros in the last layer, whose output is not
        used), otherwise the same on every rank.
        """
        _check_shapes(query, key, value)
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        query, key, value = _equally_wide(query, key, value)
        kernels = self.kernels_for(
            query.device, query.dtype, query.shape[-1], window=window is not None, softcap=softcap is not None
        )
        if profiling.are_recorded():
            kernels = kernels.in_ranges()
        fused = self._is_fused(query.device)
        tools = Tools(self.group, kernels, scale, softcap, sinks, merge_two_fused if fused else merge_two, fused)
        if phase is Phase.PREFILL:
            output = self._prefill(tools, state, layer_idx, query, key, value, window)
        else:
            self.group.progress.enter_layer(phase.value, layer_idx)
            if pack is not None:
                output = packed.attend(tools, pack, layer_idx, query, key, value, window)
            elif num_keys is not None:
                output = _attend_first(tools, query, key, value, num_keys, window)
            elif window is not None:
                output = attend_window(tools, query, key, value, window)
            else:
                kernel = kernels.decode if phase is Phase.DECODE else kernels.prefill
                output = attend_shards(tools, kernel, query, key, value, self._holds_new(phase, holds_new))
        return output[..., :value_dim]

    def _prefill(
        self,
        tools: Tools,
        state: PrefillState | None,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
    ) -> Tensor:
        if state is None:
            raise ValueError("phase=PREFILL needs state=PrefillState(plan, cache, rank).")
        _check_tokens(state, query, key)
        self.group.progress.enter_layer(Phase.PREFILL.value, layer_idx, state.round_index, len(state.plan.rounds))
        if window is not None:
            return sliding.prefill(tools, state, layer_idx, query, key, value, window)
        if self.compressor is not None:
            return apb.prefill(self.compressor, tools, state, layer_idx, query, key, value)
        return EXACT_PREFILLS[self.config.settings.method](tools, state, layer_idx, query, key, value)

    def _holds_new(self, phase: Phase, holds_new: bool | None) -> bool:
        if holds_new is None and self.group.world_size > 1:
            raise ValueError(f"phase={phase.name} on several ranks needs holds_new=cache.holds_new, after the update.")
        return holds_new is None or holds_new

    def _is_fused(self, device: torch.device) -> bool:
        return self.config.settings.fused and device.type == "cuda" and can_compile(device)

    def extra_repr(self) -> str:
        settings = self.config.settings
        hosts = f", hosts={settings.hosts}" if isinstance(settings, BlockSettings) else ""
        return f"method={settings.method}{hosts}, ranks={self.group.world_size}"


def check_available(config: APBConfig) -> None:
    """Raise ValueError or RuntimeError for a compressor or kernel that is unknown or not installed."""
    settings = config.settings
    check_kernel_name(settings.kernel)
    if isinstance(settings, BlockSettings):
        build_compressor(settings)


def _attend_first(
    tools: Tools, query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor, window: int | None
) -> Tensor:
    """Attend for one new token to the first keys of buffers, in a step that can be recorded."""
    kernel = tools.kernels.recorded
    if kernel is None:
        raise RuntimeError(f"num_keys: no attention kernel on {query.device} can be recorded in a CUDA graph.")
    part = kernel.attend_first(query, key, value, num_keys, tools.scale, window=window, softcap=tools.softcap)
    if window is not None or tools.group.is_last:
        part = tools.with_sinks(part)
    return part[0] if window is not None else merge_ranks(tools, *part)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4 or query.shape[0] != 1:
        raise ValueError(f"query must be (1, heads, tokens, head_dim), got {tuple(query.shape)}.")
    if key.dim() != 4 or key.shape[0] != 1 or key.shape[-1] != query.shape[-1] or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key must be (1, kv_heads, keys, {query.shape[-1]}) and value (1, kv_heads, keys, value_dim), "
            f"got {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads must be a multiple of {key.shape[1]} KV heads.")


def _equally_wide(*states: Tensor) -> list[Tensor]:
    """Pad the head dimension with zeros to the widest, which changes no logit and no output."""
    widest = max(part.shape[-1] for part in states)
    return [part if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1])) for part in states]


def _check_tokens(state: PrefillState, query: Tensor, key: Tensor) -> None:
    expected = state.plan.num_forward_tokens(state.rank, state.round_index)
    if query.shape[2] != expected or key.shape[2] != expected:
        raise ValueError(
            f"rank {state.rank} has {expected} tokens in round {state.round_index} (its share of the anchor, then the "
            f"blocks), got {query.shape[2]} queries and {key.shape[2]} keys."
        )
