"""Loading a model and its tokenizer, or making one with random weights of the same shape."""

from __future__ import annotations

import copy
import fnmatch
import importlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apb_ds.hf.stages import Stage, stage_of
from apb_ds.loading.adapter import merge_adapter
from apb_ds.loading.config import ModelConfig
from apb_ds.loading.damage import find_damage
from apb_ds.loading.geometry import auto_class, keep_layers, make_config, override_config, read_config
from apb_ds.loading.parts import choose_shards, log_sizes
from apb_ds.loading.quiet import quiet_transformers
from apb_ds.loading.source import find_model, weight_files
from apb_ds.loading.tokenizer import available_tokenizer, read_tokenizer
from apb_ds.ops.memory import explain_out_of_memory, is_out_of_memory
from apb_ds.parallel.consistency import shared_outcome
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.launcher import launched_rank
from apb_ds.parallel.pipeline import Pipeline
from apb_ds.utils.text import first_line, kind_and_line, list_some
from apb_ds.weights import is_sharded
from apb_ds.weights.cut import check_shardable, cut_while_loading, make_cut

DUMMY_SEED = 0

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model in eval mode on its device, and what goes with it.

    Attributes
    ----------
    model : transformers PreTrainedModel, the same weights on every rank
    tokenizer : transformers tokenizer, or None for random weights without one on this machine
    load_s : seconds from the path to the weights on the device, without the import of libraries
    source : where the weights came from, for display
    device, dtype : of the weights
    base_config : the model's config without `ModelConfig.overrides`
    shard_weights : whether each rank has its part of the weights alone
    """

    model: Any
    tokenizer: Any | None
    load_s: float
    source: str
    device: torch.device
    dtype: torch.dtype
    base_config: Any
    shard_weights: bool = False


def choose_device(name: str) -> torch.device:
    """Return the device of this process: on CUDA, its local rank's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("model.device='cuda', but torch sees no CUDA device; use cpu or auto.")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; ``auto`` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_model(
    config: ModelConfig,
    device: torch.device | None = None,
    group: SequenceGroup | None = None,
    pipeline: Pipeline | None = None,
) -> LoadedModel:
    """Load the model that `config` describes, or make a dummy of it.

    Parameters
    ----------
    device : torch.device, optional
        Instead of the config's.
    group : SequenceGroup, optional
        The ranks that share the weights where the config shards them; by default this one alone. What is read fits
        their `apb_ds.init_inference(..., shard_weights=True)`. With ``shard_weights=auto`` all ranks that the group is
        a part of call this together; otherwise nothing is sent.
    pipeline : Pipeline, optional
        Of which this rank loads its stage alone, for `apb_ds.init_inference(..., stages=)`; `group` is then a part of
        the stage's ranks.

    Returns
    -------
    LoadedModel
        In eval mode, without gradients, with the attention that transformers prefers (``sdpa`` where it can).

    Raises
    ------
    ValueError
        If a file is not found (saying where it was looked for), weights do not fit the config, or a field is unknown.
    """
    # Not part of loading: what transformers imports on first use.
    for module in ("modeling_utils", "activations", "generation", "models.auto"):
        importlib.import_module(f"transformers.{module}")
    start = time.perf_counter()
    group = group or SequenceGroup()
    shards = config.shard_weights is True
    decides = config.shard_weights == "auto" and group.world_size > 1
    # Ranks that decide together must all get that far.
    with shared_outcome(group.all_ranks) if decides else nullcontext(), quiet_transformers():
        device = device or choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        explained = partial(
            explain_out_of_memory,
            f"loading {config.path or 'the model'} to {device}",
            _levers(dtype, config.shard_weights),
        )
        with explained():
            found = _find(config)
            needs_empty = shards or decides or pipeline is not None
            empty: Any = _empty(found, config, dtype) if needs_empty else None
            if shards:
                check_shardable(empty)  # all of it: a stage may have none of what is refused
            stage, absent = (None, frozenset()) if pipeline is None else _cut_to_stage(empty, pipeline, config)
    is_watched = launched_rank() == 0 and sys.stderr.isatty()
    with explained(), quiet_transformers(with_bars=is_watched):
        if decides:
            shards = choose_shards(empty, device, group)
        if shards:
            log_sizes(empty, group)
        share = _Share((group.rank, group.world_size) if shards else None, stage, absent)
        read = _make_dummy if config.is_dummy else _read_model
        model, tokenizer, source = read(config, found, device, dtype, share)
    model.eval().requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    load_s = time.perf_counter() - start
    return LoadedModel(model, tokenizer, load_s, source, device, dtype, found.base_config, shards)


def with_positions_of(loaded: LoadedModel, config: ModelConfig) -> LoadedModel | None:
    """Return a model with the config's overrides around the weights of a loaded one, which stay where they are.

    It is what `load_model` would return. The loaded model must not be used afterwards.

    Parameters
    ----------
    config : ModelConfig
        One that `shares_weights_with` that of the loaded model.

    Returns
    -------
    LoadedModel, or None if this model must be loaded again: it is quantised, runs its own code, has buffers among its
    weights, or does not fit.

    Raises
    ------
    ValueError
        For overrides that transformers refuses.
    """
    start = time.perf_counter()
    model_config = _final_config(loaded.base_config, config)
    old, weights = loaded.model, loaded.model.state_dict(keep_vars=True)
    # Buffers that are saved with the weights may come from the config.
    has_weights_alone = set(weights) == {name for name, _ in old.named_parameters(remove_duplicate=False)}
    if getattr(old, "hf_quantizer", None) or config.trust_remote_code or not has_weights_alone or _is_cut(old):
        return None
    try:
        with quiet_transformers():
            model = _without_weights(model_config, loaded.dtype)
        model.load_state_dict(weights, assign=True)
    except Exception:  # of many kinds: loading again says what is wrong
        return None
    model.tie_weights()
    model.generation_config = old.generation_config
    # The weights are there already; buffers that are computed from the config are not.
    model.to(loaded.device).eval().requires_grad_(False)
    return replace(loaded, model=model, load_s=time.perf_counter() - start)


def _is_cut(model: Any) -> bool:
    return is_sharded(model) or stage_of(model) is not None


@dataclass(frozen=True)
class _Found:
    """What describes a model before it has weights.

    Attributes
    ----------
    directory : of the model; None for a dummy made from `ModelConfig.geometry`
    base_config : as of `LoadedModel`
    model_config : what the model is made with
    named : the setting that it comes from
    """

    directory: Path | None
    base_config: Any
    model_config: Any
    named: str


@dataclass(frozen=True)
class _Share:
    """What this rank has of a model.

    Attributes
    ----------
    part : which of how many parts of the linear layers; None for whole ones
    stage : that it has, of the model without data
    absent : names of the weights of other stages
    """

    part: tuple[int, int] | None
    stage: Stage | None
    absent: frozenset[str]


def _cut_to_stage(empty: Any, pipeline: Pipeline, config: ModelConfig) -> tuple[Stage, frozenset[str]]:
    """Cut a model without data to this rank's stage; return that, and the names of the weights that are gone."""
    if config.adapter is not None:
        raise ValueError(
            f"model.adapter={config.adapter!r} needs the whole model; merge it into the weights, or use stages=1."
        )
    weights = dict(empty.named_parameters(remove_duplicate=False))
    stage = Stage(empty, pipeline)
    kept = {id(weight) for weight in empty.parameters()}  # a tied head's weight also has the embedding's name
    return stage, frozenset(name for name, weight in weights.items() if id(weight) not in kept)


def _find(config: ModelConfig) -> _Found:
    if config.is_dummy or config.path is None:
        directory, base_config = _dummy_config(config)
    else:
        directory = find_model(config.path)
        base_config = read_config(directory, config)
    named = "model.geometry" if directory is None else f"model.path={config.path!r}"
    return _Found(directory, base_config, _final_config(base_config, config), named)


def _empty(found: _Found, config: ModelConfig, dtype: torch.dtype) -> Any:
    """Return the model without weights; ValueError if transformers cannot build it."""
    try:
        return _without_weights(found.model_config, dtype, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of many kinds: whatever layers raise for sizes that do not fit together
        raise ValueError(f"{found.named}: {_explain(None, found.model_config, error)}") from error


def _without_weights(model_config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """Return a model whose buffers are real and whose weights are on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(model_config).from_config(model_config, dtype=dtype, **options)
    model.tie_weights()
    return model


def _levers(dtype: torch.dtype, shard_weights: bool | str) -> str:
    """Return what helps if a model of this dtype does not fit into memory."""
    half = "model.dtype=bfloat16, which halves the weights, " if dtype.itemsize > 2 else ""
    shards = "" if shard_weights else "model.shard_weights=true, which keeps one copy over all ranks, "
    return f"What helps: {half}{shards}a device with more memory, fewer ranks on one machine, or a smaller model."


def _final_config(base_config: Any, config: ModelConfig) -> Any:
    """Return the config that a model is made with; `base_config` stays as it is."""
    model_config = override_config(copy.deepcopy(base_config), config.overrides)
    if config.num_layers is not None:
        keep_layers(model_config, config.num_layers)
    return model_config


def _read_model(
    config: ModelConfig, found: _Found, device: torch.device, dtype: torch.dtype, share: _Share
) -> tuple[Any, Any, str]:
    directory, model_config = found.directory, found.model_config
    assert config.path is not None and directory is not None
    path = config.path
    # `_check_keys` refuses tensors of another shape, together with the other keys that do not fit.
    options: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if device.type == "cuda" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}  # tensor by tensor, without a copy of the model on the host
    try:
        is_whole = share.part is None and not share.absent
        with nullcontext() if is_whole else cut_while_loading(*(share.part or ()), absent=share.absent):
            loaded: Any = auto_class(model_config).from_pretrained(
                directory,
                config=model_config,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # of many kinds, from transformers, safetensors, torch and pickle
        if is_out_of_memory(error):
            raise
        raise ValueError(f"model.path={path!r}: {_explain(directory, model_config, error)}") from error
    model, info = loaded
    _check_keys(path, info, config.ignore_keys)
    tokenizer = read_tokenizer(config, directory, model.get_input_embeddings().num_embeddings)
    if share.stage is not None:
        share.stage.like(model)
    model, source = model.to(device), path
    if config.adapter is not None:
        model, source = merge_adapter(model, config.adapter, share.part), f"{source} with {config.adapter}"
    return model, tokenizer, source


def _explain(directory: Path | None, model_config: Any, error: Exception) -> str:
    """Return why transformers cannot make this model, and what to do; `directory` holds its weights, if it has any."""
    if isinstance(error, ImportError):
        return f"loading it needs a package that is not installed or too old ({first_line(error)})."
    if directory is None:
        return f"transformers cannot build this model ({kind_and_line(error)}); correct its fields or model.overrides."
    damage = find_damage([*weight_files(directory), directory / "generation_config.json"])
    if damage is None:
        return (
            f"transformers cannot load {directory} ({kind_and_line(error)}); its weight files can be read, so check "
            "its config.json and model.overrides."
        )
    return f"{directory} is damaged ({damage}); copy or download these files again."


def _check_keys(path: str, info: dict[str, Any], ignored: Sequence[str]) -> None:
    """Raise ValueError if weights are missing, left over or of another shape: the model would answer nonsense.

    Parameters
    ----------
    ignored : as `ModelConfig.ignore_keys`
    """
    unexpected = set(info.get("unexpected_keys") or ())
    for pattern in ignored:
        if not fnmatch.filter(unexpected, pattern):
            left = list_some(sorted(unexpected)) or "none"
            raise ValueError(
                f"model.ignore_keys: {pattern!r} matches no unexpected weight in model.path={path!r} (unexpected: "
                f"{left}); correct the pattern or leave it out."
            )
    dropped = {key for pattern in ignored for key in fnmatch.filter(unexpected, pattern)}
    if dropped:
        logger.warning("model.ignore_keys leaves out weights of %s: %s.", path, list_some(sorted(dropped)))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(_describe_key(key) for key in info.get(kind) or () if key not in dropped)
        if keys:
            ignore = ", or leave such weights out with model.ignore_keys" if kind == "unexpected_keys" else ""
            raise ValueError(
                f"model.path={path!r}: its weights do not fit its config, {kind.replace('_', ' ')}: "
                f"{list_some(keys)}; check its config.json and model.overrides{ignore}."
            )


def _describe_key(key: Any) -> str:
    """Return a tensor's name; if its shape differs, also the stored and the expected shape."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} is {tuple(stored)}, not {tuple(wanted)}"


def _make_dummy(
    config: ModelConfig, found: _Found, device: torch.device, dtype: torch.dtype, share: _Share
) -> tuple[Any, Any, str]:
    directory, model_config = found.directory, found.model_config
    # The same seed on every rank gives the same random weights. They are made on the device, in the dtype.
    devices = [device] if device.type == "cuda" else []
    try:
        if share.part is not None or share.stage is not None:
            model = _without_weights(model_config, dtype)
            if share.stage is not None:
                share.stage.like(model)
            make_cut(model, device, *(share.part or (0, 1)))
        else:
            with torch.random.fork_rng(devices), torch.device(device):
                torch.manual_seed(DUMMY_SEED)
                model = auto_class(model_config).from_config(model_config, dtype=dtype)
    except Exception as error:  # of many kinds: whatever layers raise for sizes that do not fit together
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{found.named}: {_explain(None, model_config, error)}") from error
    tokenizer = available_tokenizer(config, directory, model.get_input_embeddings().num_embeddings)
    shape = f"{model_config.model_type}, {model_config.get_text_config().num_hidden_layers} layers"
    source = f"random weights ({shape}; {found.named if directory is None else config.path})"
    return model, tokenizer, source


def _dummy_config(config: ModelConfig) -> tuple[Path | None, Any]:
    """Return the path's directory and config if it is on this machine, otherwise None and the geometry's config."""
    if config.path is not None:
        try:
            directory = find_model(config.path, weights=False, download=not config.geometry)
        except ValueError:
            if not config.geometry:
                raise
        else:
            return directory, read_config(directory, config)
    return None, make_config(config.geometry)
