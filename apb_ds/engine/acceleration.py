"""How an engine's model computes, whatever it attends to: fused layers, tiled MLPs, oneDNN, recorded decode steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import PreTrainedModel

from apb_ds.config import MethodSettings
from apb_ds.engine.cuda_graph import RecordedSteps, can_record
from apb_ds.engine.packed_graphs import PackedGraphs, can_record_packs
from apb_ds.hf.architecture import text_decoder
from apb_ds.hf.fused_layers import fused_layers
from apb_ds.hf.onednn_linears import bound_primitive_caches, onednn_linears
from apb_ds.hf.stages import stage_of
from apb_ds.hf.tiled_mlps import default_tile, tiled_mlps
from apb_ds.hf.zero3 import is_partitioned
from apb_ds.ops.kernels import KernelChoice
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.utils.sizes import LayerAttention


class Acceleration:
    """What was prepared for a model's `cuda_graph`, `fused` and `mlp_tile` settings.

    Parameters
    ----------
    model : transformers decoder, on its device
    settings : MethodSettings
    group : the ranks that share a request
    kernels : that attention uses, by kind of layer
    layers : how each layer attends

    Attributes
    ----------
    recorded, packed : where decode steps of one sequence and of packs are recorded, or None
    fused : the layers that are fused, or None
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: MethodSettings,
        group: SequenceGroup,
        kernels: Mapping[str, KernelChoice],
        layers: Sequence[LayerAttention],
    ) -> None:
        device = next(model.parameters()).device
        if device.type == "cpu":
            bound_primitive_caches()
        # Weights that ZeRO-3 partitions are gathered by each module's own forward, to another place each time.
        self._is_partitioned = is_partitioned(model)
        # Messages between stages are not recorded.
        is_whole = not self._is_partitioned and stage_of(model) is None
        records = settings.cuda_graph and is_whole and can_record(model, kernels.values())
        self.recorded = RecordedSteps(model, group) if records else None
        self.packed = PackedGraphs(model, group) if records and can_record_packs(kernels.values(), layers) else None
        self.fused = fused_layers(model, settings.fused and not self._is_partitioned, device)
        self._model = (model,)  # not a submodule of anything
        default = None if self._is_partitioned else default_tile(device)
        self._tile = default if settings.mlp_tile is None else settings.mlp_tile
        self._made_for = _key(settings, group, kernels)

    def serves(self, settings: MethodSettings, group: SequenceGroup, kernels: Mapping[str, KernelChoice]) -> bool:
        """Whether it can stay under other settings: an evaluation changes the prefill's with every sample."""
        return self._made_for == _key(settings, group, kernels)

    @contextmanager
    def in_prefill(self, num_tokens: int) -> Iterator[None]:
        """Have the model compute forwards of about `num_tokens` tokens; restore it on leaving."""
        with ExitStack() as stack:
            if not self._is_partitioned:
                decoder = text_decoder(self._model[0])
                stack.enter_context(onednn_linears(decoder, min(num_tokens, self._tile or num_tokens)))
            stack.enter_context(self.in_decoding())
            yield

    @contextmanager
    def in_decoding(self) -> Iterator[None]:
        """Have the model compute forwards of a few tokens; restore it on leaving."""
        with ExitStack() as stack:
            if self.fused is not None:
                stack.enter_context(self.fused.in_force())
            stack.enter_context(tiled_mlps(self._model[0], self._tile))
            yield


def _key(settings: MethodSettings, group: SequenceGroup, kernels: Mapping[str, KernelChoice]) -> tuple[Any, ...]:
    recorded = tuple(None if choice.recorded is None else choice.recorded.name for choice in kernels.values())
    return settings.cuda_graph, settings.fused, settings.mlp_tile, recorded, group.world_size
