"""Ways into an engine: make one for a model, put APB into one that exists, and take it out again."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.inference.engine import InferenceEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn
from transformers import PreTrainedModel

from apb_ds.attention import APBAttention
from apb_ds.config import APBConfig
from apb_ds.engine import APBEngine
from apb_ds.hf import check_supported
from apb_ds.parallel.groups import DEFAULT_TIMEOUT_S, SequenceGroup, launched_world_size, world_group
from apb_ds.plan import check_ranks


def init_inference(
    model: PreTrainedModel,
    config: APBConfig | None = None,
    *,
    mpu: Any = None,
    group: SequenceGroup | None = None,
    retaining_heads: str | None = None,
    timeout_s: float | None = None,
) -> APBEngine:
    """Make an engine for a model, alone or over the ranks that ``deepspeed`` or ``torchrun`` started.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder whose attention goes through transformers' AttentionInterface. Its dtype is kept; it is moved to the
        accelerator of this rank.
    config : APBConfig
        By default all defaults.
    mpu : object
        A Megatron-style object; its sequence-parallel group is used. By default all ranks share a request.
    group : SequenceGroup
        Instead of `mpu`, a group made before.
    retaining_heads : str
        Path or hub id of trained heads for ``compressor="retaining_heads"``.
    timeout_s : float, seconds
        How long a collective may take. By default 300 where the process group is made here; one that exists keeps its
        own.

    Raises
    ------
    ValueError, RuntimeError
        For a model, settings or a group that cannot be served, on every rank before anything is sent.
    """
    config = APBConfig() if config is None else config
    if isinstance(model, PipelineModule):
        raise ValueError("model is a DeepSpeed PipelineModule; APB does not run in a pipeline yet.")
    if isinstance(model, InferenceEngine):
        raise ValueError("model is an inference engine already; use apb_ds.attach(engine, config).")
    if retaining_heads is not None and config.compressor != "retaining_heads":
        raise ValueError(
            f"retaining_heads={retaining_heads!r} goes with compressor='retaining_heads', not {config.compressor!r}."
        )
    if group is None and mpu is None and not torch.distributed.is_initialized():
        check_ranks(config, launched_world_size())
    check_supported(model)
    APBAttention(config)  # refuses unknown names before the ranks meet
    if group is None:
        group = SequenceGroup.from_mpu(mpu) if mpu is not None else world_group(timeout_s or DEFAULT_TIMEOUT_S)
    if timeout_s is not None:
        group.set_timeout(timeout_s)
    return APBEngine(model, config, group)


def attach(engine: InferenceEngine, config: APBConfig | None = None, *, mpu: Any = None) -> APBEngine:
    """Put APB into an engine that ``deepspeed.init_inference`` made.

    The engine's own ``generate`` becomes APB's, so that code which holds the engine gains APB too;
    ``generate(input_ids=..., query_length=q)`` splits off the last q tokens as the query.

    Returns
    -------
    APBEngine over the same module; `detach` undoes all of it

    Raises
    ------
    ValueError
        For an engine with tensor parallelism, kernel injection, CUDA graphs or a pipeline.
    """
    if not isinstance(engine, InferenceEngine):
        raise ValueError(f"engine={type(engine).__name__} must be a deepspeed.InferenceEngine.")
    if isinstance(engine, APBEngine):
        raise ValueError("engine is an APBEngine already; change its settings with engine.configure(config).")
    if isinstance(getattr(engine.__dict__.get("generate"), "__self__", None), APBEngine):
        raise ValueError("engine has APB attached already; detach that first, or use its configure(config).")
    settings = engine._config
    if settings.tensor_parallel.tp_size > 1:
        raise ValueError(f"tp_size={settings.tensor_parallel.tp_size} is not supported; use tp_size=1.")
    if settings.replace_with_kernel_inject or settings.enable_cuda_graph:
        raise ValueError(
            "replace_with_kernel_inject and enable_cuda_graph replace the attention that APB works in; off."
        )
    attached = init_inference(engine.module, config, mpu=mpu)
    before = {"generate": engine.__dict__["generate"]} if "generate" in engine.__dict__ else {}
    attached._attached_to = (engine, before)
    engine.__dict__["generate"] = attached.generate
    return attached


def detach(engine: APBEngine) -> InferenceEngine | nn.Module:
    """Undo `attach`; see `APBEngine.detach`."""
    return engine.detach()
