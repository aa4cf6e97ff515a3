"""Load a model, make an engine for it, attach APB to an existing engine, and detach it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.inference.engine import InferenceEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import nn
from transformers import PreTrainedModel

from apb_ds.attention import check_available
from apb_ds.config import APBConfig, config_and_heads
from apb_ds.engine.engine import APBEngine, move_to_accelerator
from apb_ds.engine.saved_facts import model_facts
from apb_ds.engine.split import Split
from apb_ds.engine.validation import settings_facts
from apb_ds.hf.architecture import check_supported
from apb_ds.hf.stages import Stage, check_stage_of, stage_of
from apb_ds.hf.zero3 import check_partition, is_partitioned
from apb_ds.loading import ModelConfig
from apb_ds.loading import load_model as load_described
from apb_ds.loading.config import check_shard_weights
from apb_ds.loading.heads import HeadsSource, heads_for
from apb_ds.parallel.consistency import describe_software, shared_validation
from apb_ds.parallel.groups import DEFAULT_TIMEOUT_S, SequenceGroup, world_group
from apb_ds.parallel.launcher import launched_world_size
from apb_ds.parallel.pipeline import Pipeline, check_stages
from apb_ds.plan import check_ranks
from apb_ds.weights import ShardedWeights, check_shard_ranks, check_weights_for, is_sharded


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    shard_ranks: int | None = None,
    stages: int = 1,
    **settings: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer, as the command line does.

    Parameters
    ----------
    path : str or path
        A directory, a ``.gguf`` file, ``package://<package>/<file>`` or a hub id.
    dtype : str or torch.dtype
        ``auto`` (bfloat16 on CUDA, float32 on CPU), ``float32``, ``bfloat16`` or ``float16``.
    device : str
        ``auto`` (this rank's GPU if there is one), ``cpu`` or ``cuda``.
    shard_ranks : int
        With `shard_weights`, as in `init_inference`. All ranks call this together.
    stages : int
        As in `init_inference`: this rank loads its stage's layers alone. All ranks call this together.
    **settings
        Further fields of `apb_ds.loading.ModelConfig`, such as ``tokenizer``, ``adapter`` and ``overrides``. With
        ``shard_weights=True`` each of all ranks reads its part alone, for ``init_inference(..., shard_weights=True)``;
        with ``"auto"``, for which all ranks call this together, they do where a copy does not fit on every rank.

    Returns
    -------
    The model, in eval mode on its device, and its transformers tokenizer (None for random weights without one)

    Raises
    ------
    ValueError
        If something is missing or does not fit, or a setting is unknown. Settings are named ``model.dtype`` and so on.
        If ranks that share weights have other `shard_ranks` than each other.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path must be a path or an id, got {type(path).__name__}.")
    named = str(dtype).removeprefix("torch.")
    values = {"path": os.fspath(path), "dtype": named, "device": str(device), **settings}
    config = ModelConfig.from_dict(values)
    group = world_group() if config.shard_weights or stages != 1 else SequenceGroup()
    with shared_validation(group, "load_model") as comparison:
        check_stages(stages, group.world_size)
        num_sharing = group.world_size // stages
        check_shard_ranks(shard_ranks, config.shard_weights, num_sharing)
        comparison.facts = {"shard_ranks": shard_ranks or num_sharing, "stages": stages}
    pipeline = Pipeline.of(group, stages) if stages > 1 else None
    sharing = group if pipeline is None else pipeline.ranks
    loaded = load_described(config, group=sharing.part(shard_ranks), pipeline=pipeline)
    return loaded.model, loaded.tokenizer


def init_inference(
    model: PreTrainedModel,
    config: APBConfig | Mapping[str, Any] | None = None,
    *,
    mpu: Any = None,
    group: SequenceGroup | None = None,
    retaining_heads: HeadsSource | None = None,
    timeout_s: float | None = None,
    shard_weights: bool | str = False,
    shard_ranks: int | None = None,
    stages: int = 1,
    split: Split | Mapping[str, Any] | None = None,
) -> APBEngine:
    """Make an engine for a model, alone or over the ranks that ``deepspeed`` or ``torchrun`` started.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder whose attention goes through transformers' AttentionInterface. Its dtype is kept; it is moved to the
        accelerator of this rank.
    config : APBConfig or mapping
        By default all defaults. A mapping holds fields of `APBConfig`, as DeepSpeed's configs do, or is the section
        ``method`` of a config that Hydra composed, whose ``retaining_heads`` count unless they are given here.
    mpu : object
        A Megatron-style object; its sequence-parallel group is used. By default all ranks share a request.
    group : SequenceGroup
        Instead of `mpu`, a group made before.
    retaining_heads : str or RetainingHeads
        Trained heads for ``compressor="retaining_heads"``: the path of a ``.pt`` or ``.safetensors`` file, a directory,
        ``package://<package>/<path>``, a hub id, or heads that are loaded already.
    timeout_s : float, seconds
        How long a collective may take. By default 300 where the process group is made here; one that exists keeps its
        own.
    shard_weights : bool or str
        Keep one copy of the weights over all ranks, each a part: a prefill gathers them layer by layer, all else uses
        them where they are. The model is changed for good: all ranks must call it together. ``"auto"``: if
        `load_model` has loaded this rank's part alone.
    shard_ranks : int
        With `shard_weights`, how many ranks hold a copy together: ranks that follow each other, such as those of a
        node. A divisor of the number of ranks, or of those of a stage, which is the default.
    stages : int
        Cut the model into so many stages of a pipeline, a divisor of the number of ranks: those that follow each other
        have some of its layers, and share the document. The model is changed for good.
    split : Split or mapping
        Where `APBEngine.generate` cuts prompts of which it is not told how long the query is.

    Raises
    ------
    ValueError, RuntimeError
        For a model, settings or a group that cannot be served, on every rank before anything is computed; where ranks
        have other settings, weights or versions than the others, saying which rank has what.
    """
    config, retaining_heads = config_and_heads(config, retaining_heads)
    split = Split.of(split)
    if isinstance(model, PipelineModule):
        raise ValueError(
            "model is a DeepSpeed PipelineModule, whose layers attend as they were written to. Pass the transformers "
            "model and stages=S, or use apb_ds.APBAttention in the layers: see docs/integration.md."
        )
    if isinstance(model, (InferenceEngine, DeepSpeedEngine)):
        raise ValueError("model is an engine of DeepSpeed's already; use apb_ds.attach(engine, config).")
    if group is None and mpu is None and not torch.distributed.is_initialized():
        check_stages(stages, launched_world_size())  # before the ranks meet
        _check_served(model, config, launched_world_size() // stages)
        retaining_heads = heads_for(model, config, retaining_heads)
    if group is None:
        group = SequenceGroup.from_mpu(mpu) if mpu is not None else world_group(timeout_s or DEFAULT_TIMEOUT_S)
    if timeout_s is not None:
        group.set_timeout(timeout_s)
    weights = None
    stage = None
    with shared_validation(group, "init_inference") as comparison:
        check_stages(stages, group.world_size)
        num_sharing = group.world_size // stages
        _check_served(model, config, num_sharing)
        check_stage_of(model, stages, group)
        heads = heads_for(model, config, retaining_heads)
        check_shard_weights("shard_weights", shard_weights)
        check_shard_ranks(shard_ranks, shard_weights, num_sharing)
        shard_weights = is_sharded(model) if shard_weights == "auto" else bool(shard_weights)
        check_partition(model, group, shard_weights)
        check_weights_for(model, shard_weights, shard_ranks or num_sharing)
        sends = shard_weights or is_partitioned(model) or stages > 1
        if not sends:
            engine = APBEngine(model, config, group, heads)
        comparison.facts = {
            **describe_software(),
            **settings_facts(config),
            "model": None if is_sharded(model) or stage_of(model) is not None else model,
            "retaining heads": heads,
            "shard_weights": shard_weights,
            "shard_ranks": shard_ranks or num_sharing,
            "stages": stages,
        }
    # Outside of the comparison: sharding and the engine's trial forward send messages, also if ZeRO-3 gathers for it.
    sharing = group
    if stages > 1:
        was_cut = stage_of(model) is not None
        stage = Stage.of(model, group, stages)
        group, sharing = stage.pipeline.group, stage.pipeline.ranks
        if timeout_s is not None:
            group.set_timeout(timeout_s)  # also of the groups that the pipeline has made
        if was_cut and not shard_weights:
            with shared_validation(sharing, "init_inference") as comparison:
                comparison.facts = {"model": model}
    if shard_weights:
        weights = ShardedWeights.of(model, sharing.part(shard_ranks))
        move_to_accelerator(model)  # cut first: whole weights may not fit there
        weights.facts = model_facts(model, weights.whole_weights())
        with shared_validation(sharing, "init_inference") as comparison:
            comparison.facts = weights.facts
    if sends:
        engine = APBEngine(model, config, group, heads, weights, stage)
    engine.split = split
    return engine


def _check_served(model: PreTrainedModel, config: APBConfig, world_size: int) -> None:
    """Raise ValueError or RuntimeError for settings or a model that cannot be served by so many ranks."""
    check_ranks(config, world_size)
    check_supported(model)
    check_available(config)


def attach(
    engine: InferenceEngine | DeepSpeedEngine,
    config: APBConfig | Mapping[str, Any] | None = None,
    *,
    mpu: Any = None,
    retaining_heads: HeadsSource | None = None,
    split: Split | Mapping[str, Any] | None = None,
) -> APBEngine:
    """Put APB into an engine of DeepSpeed's, from ``deepspeed.init_inference`` or ``deepspeed.initialize``.

    The engine's ``generate`` becomes APB's, so code that holds the engine gains APB unchanged: of prompts, `split` says
    which part is the document, unless a call gives ``query_length``. A training engine stays in training mode, to go on
    training; between its steps all ranks ask the same. The parameters are those of `init_inference`.

    Returns
    -------
    APBEngine over the same module; `detach` undoes all of it

    Raises
    ------
    ValueError
        For an engine with tensor parallelism, kernel injection, CUDA graphs, compiled modules, parameters that ZeRO
        offloads, or a pipeline.
    """
    if isinstance(engine, APBEngine):
        raise ValueError("engine is an APBEngine already; change its settings with engine.configure(config).")
    if not isinstance(engine, (InferenceEngine, DeepSpeedEngine)):
        raise ValueError(
            f"engine={type(engine).__name__} must be a deepspeed.InferenceEngine or deepspeed.DeepSpeedEngine."
        )
    if _attached_to(engine) is not None:
        raise ValueError("engine has APB attached already; detach that first, or use its configure(config).")
    if isinstance(engine, InferenceEngine):
        _check_inference_engine(engine)
    else:
        _check_training_engine(engine)
    attached = init_inference(engine.module, config, mpu=mpu, retaining_heads=retaining_heads, split=split)
    before = {"generate": engine.__dict__["generate"]} if "generate" in engine.__dict__ else {}
    attached._attached_to = (engine, before)
    if isinstance(engine, DeepSpeedEngine):
        attached.restore_training()
    engine.__dict__["generate"] = attached.generate
    return attached


def _check_inference_engine(engine: InferenceEngine) -> None:
    """Raise ValueError if an engine has replaced what APB needs."""
    settings = engine._config
    if settings.tensor_parallel.tp_size > 1:
        raise ValueError(
            f"tp_size={settings.tensor_parallel.tp_size} shards the model's weights, which APB does not support; use "
            "tp_size=1, or apb_ds.init_inference(model, config, shard_weights=True), which shards them itself."
        )
    if settings.replace_with_kernel_inject or settings.enable_cuda_graph:
        raise ValueError(
            "replace_with_kernel_inject and enable_cuda_graph replace the attention that APB runs in; switch them off."
        )


def _check_training_engine(engine: DeepSpeedEngine) -> None:
    """Raise ValueError if a training engine's model cannot be asked between its steps."""
    if isinstance(engine, DeepSpeedHybridEngine):
        raise ValueError("hybrid_engine replaces the attention that APB runs in; switch it off.")
    if isinstance(engine, PipelineEngine):
        raise ValueError("engine is a DeepSpeed PipelineEngine; APB does not run in its pipeline.")
    offload = engine.zero_offload_param()
    place = OffloadDeviceEnum.none if offload is None else OffloadDeviceEnum(offload.device)
    if place != OffloadDeviceEnum.none:
        raise ValueError(
            f"offload_param to {place.value} keeps parameters off their device, which APB does not support; "
            "leave it out. offload_optimizer is supported."
        )
    if engine.is_compiled:
        raise ValueError("engine.compile() has compiled the attention that APB replaces; leave it out.")


def _attached_to(engine: Any) -> APBEngine | None:
    """Return the engine whose `generate` an engine of DeepSpeed's has, if `attach` gave it one."""
    found = getattr(vars(engine).get("generate"), "__self__", None)
    return found if isinstance(found, APBEngine) else None


def detach(engine: APBEngine | InferenceEngine | DeepSpeedEngine) -> nn.Module:
    """Undo `attach`, given the engine that it returned or the one that it was called with; see `APBEngine.detach`."""
    attached = engine if isinstance(engine, APBEngine) else _attached_to(engine)
    if attached is None:
        raise ValueError(f"engine={type(engine).__name__} has no APB attached.")
    return attached.detach()
