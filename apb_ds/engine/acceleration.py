"""How an engine's model computes, whatever it attends to: fused layers, MLPs in tiles, recorded decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from apb_ds.config import APBConfig
from apb_ds.engine.cuda_graph import RecordedSteps, can_record
from apb_ds.hf.fused_layers import fused_layers
from apb_ds.hf.tiled_mlps import default_tile, tiled_mlps
from apb_ds.ops.kernels import KernelChoice
from apb_ds.parallel.groups import SequenceGroup


class Execution:
    """What was prepared for the execution settings of an engine.

    Parameters
    ----------
    model : transformers decoder, on its device
    config : its `cuda_graph` and `fused` count
    group : the ranks that share a request
    kernels : that attention uses

    Attributes
    ----------
    recorded : where decode steps are recorded, or None
    fused : the layers that are fused, or None
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: APBConfig,
        group: SequenceGroup,
        kernels: KernelChoice,
        device: torch.device,
    ) -> None:
        self.recorded = (
            RecordedSteps(model, group) if config.settings.cuda_graph and can_record(model, kernels) else None
        )
        self.fused = fused_layers(model, config.settings.fused, device)
        self._made_for = _key(config, group, kernels)

    def serves(self, config: APBConfig, group: SequenceGroup, kernels: KernelChoice) -> bool:
        """Whether it can stay under other settings: an evaluation changes those of the prefill with every sample."""
        return self._made_for == _key(config, group, kernels)

    @contextmanager
    def in_force(self, model: PreTrainedModel, tile: int | None) -> Iterator[None]:
        """Have the model compute with fused layers, and its MLPs `tile` tokens at a time; on leaving, as it was."""
        with ExitStack() as stack:
            if self.fused is not None:
                stack.enter_context(self.fused.in_force())
            stack.enter_context(tiled_mlps(model, tile))
            yield


def mlp_tile(config: APBConfig, device: torch.device) -> int | None:
    """Return how many tokens an MLP computes at a time, None for all at once."""
    return default_tile(device) if config.settings.mlp_tile is None else config.settings.mlp_tile


def _key(config: APBConfig, group: SequenceGroup, kernels: KernelChoice) -> tuple[Any, ...]:
    recorded = None if kernels.recorded is None else kernels.recorded.name
    return config.settings.cuda_graph, config.settings.fused, recorded, group.world_size
