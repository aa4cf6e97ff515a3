"""Loading a model and its tokenizer, or making a random one of the same shape."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apb_ds.config import suggest
from apb_ds.loading.config import ModelConfig
from apb_ds.loading.damage import find_damage
from apb_ds.loading.quiet import quiet_transformers
from apb_ds.loading.source import find_model
from apb_ds.loading.wording import first_line
from apb_ds.ops.memory import explain_out_of_memory, is_out_of_memory

DUMMY_SEED = 0
SHOWN_KEYS = 5


@dataclass
class LoadedModel:
    """A model in eval mode on its device, and what goes with it.

    Attributes
    ----------
    model : transformers PreTrainedModel, the same weights on every rank
    tokenizer : transformers tokenizer, or None for random weights whose tokenizer is not at hand
    load_s : seconds from the path to the weights on the device, the import of libraries not counted
    source : where the weights came from, for people
    device, dtype : where and what the weights are
    """

    model: Any
    tokenizer: Any | None
    load_s: float
    source: str
    device: torch.device
    dtype: torch.dtype


def choose_device(name: str) -> torch.device:
    """Return the device of this process: on CUDA the one of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("model.device='cuda', but torch sees no CUDA device; use cpu or auto.")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype by its name; ``auto`` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_model(config: ModelConfig, device: torch.device | None = None) -> LoadedModel:
    """Load the model that `config` describes, or make its dummy.

    Parameters
    ----------
    device : torch.device, optional
        Where to put it, if not where the config says.

    Returns
    -------
    LoadedModel
        In eval mode, without gradients, with ``sdpa`` attention.

    Raises
    ------
    ValueError
        If anything is not found (saying where it looked), weights do not fit the config, or a field is unknown.
    """
    # What transformers imports on first use is not loading: have it done before the clock starts.
    for module in ("modeling_utils", "activations", "generation", "models.auto"):
        importlib.import_module(f"transformers.{module}")
    device = device or choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    start = time.perf_counter()
    levers = f"What helps: a smaller dtype than {str(dtype).removeprefix('torch.')} (model.dtype), or a larger device."
    with quiet_transformers(), explain_out_of_memory(f"loading {config.path or 'the model'} to {device}", levers):
        model, tokenizer, source = (_make_dummy if config.is_dummy else _read_model)(config, device, dtype)
    model.eval().requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return LoadedModel(model, tokenizer, time.perf_counter() - start, source, device, dtype)


def _read_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM

    assert config.path is not None
    directory = find_model(config.path)
    model_config = _overridden(_read_config(directory, config), config.overrides)
    options: dict[str, Any] = {}
    if device.type == "cuda" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}  # tensor by tensor to the device, with no copy of the model on the host
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=model_config,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # of many kinds, from transformers, safetensors, torch and pickle
        if is_out_of_memory(error) or isinstance(error, ImportError):
            raise
        raise ValueError(_unreadable(config.path, directory, error)) from error
    model, info = loaded
    _check_keys(config.path, info)
    tokenizer = _read_tokenizer(config.tokenizer, directory, config)
    _check_tokenizer(config, tokenizer, model)
    return model.to(device), tokenizer, config.path


def _unreadable(path: str, directory: Path, error: Exception) -> str:
    """Return what to say of a model that is there and cannot be loaded."""
    damage = find_damage(directory)
    if damage is not None:
        return f"model.path={path!r}: {directory} is damaged ({damage}); copy or download these files again."
    if "Unrecognized configuration class" in str(error):
        return (
            f"model.path={path!r} is no decoder that generates text: {first_line(error)}. Set model.path to a causal "
            "language model."
        )
    return (
        f"model.path={path!r}: transformers cannot load {directory} ({type(error).__name__}: {first_line(error)}). If "
        "its files are those that save_pretrained wrote, one of them may be damaged."
    )


def _check_tokenizer(config: ModelConfig, tokenizer: Any, model: Any) -> None:
    """Raise ValueError if the tokenizer has ids that the model does not know. The model may know more: it is padded."""
    known = model.get_input_embeddings().num_embeddings
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed > known:
        place = f"model.tokenizer={config.tokenizer!r}" if config.tokenizer else f"the tokenizer in {config.path!r}"
        raise ValueError(
            f"{place} does not match the model: it has ids up to {needed - 1}, and model.path={config.path!r} knows "
            f"{known} tokens (0 to {known - 1}). Set model.tokenizer to the model's own."
        )


def _check_keys(path: str, info: dict[str, Any]) -> None:
    """Raise ValueError if weights are missing, left over or of another shape: such a model would answer nonsense."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            raise ValueError(
                f"model.path={path!r}: its weights do not fit its config, {kind.replace('_', ' ')}: "
                f"{', '.join(keys[:SHOWN_KEYS])}{more}."
            )


def _make_dummy(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM

    directory, model_config = _dummy_config(config)
    model_config = _overridden(model_config, config.overrides)
    if config.num_layers is not None:
        _keep_layers(model_config, config.num_layers)
    # Same seed on every rank: random weights, but the same ones. Made on the device, in the dtype.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(DUMMY_SEED)
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa")
    tokenizer = _tokenizer_at_hand(config, directory, model_config.vocab_size)
    if tokenizer is not None:
        _check_tokenizer(config, tokenizer, model)
    shape = f"{model_config.model_type}, {model_config.num_hidden_layers} layers"
    geometry = config.path if directory is not None else "model.geometry"
    return model, tokenizer, f"random weights ({shape}; {geometry})"


def _dummy_config(config: ModelConfig) -> tuple[Path | None, Any]:
    """Return the directory and the config of the path if it is at hand, else None and the geometry's config."""
    from transformers import AutoConfig

    if config.path is not None:
        try:
            directory = find_model(config.path, weights=False, download=not config.geometry)
            return directory, _read_config(directory, config)
        except ValueError:
            if not config.geometry:
                raise
    fields = dict(config.geometry)
    try:
        return None, AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"model.geometry does not make a transformers config: {error}") from error


def _keep_layers(model_config: Any, num_layers: int) -> None:
    if num_layers > model_config.num_hidden_layers:
        raise ValueError(
            f"model.num_layers={num_layers} is more than the model has; use at most {model_config.num_hidden_layers}."
        )
    model_config.num_hidden_layers = num_layers
    if getattr(model_config, "layer_types", None):
        model_config.layer_types = model_config.layer_types[:num_layers]


def _read_config(directory: Path, config: ModelConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of many kinds; a config may be anything
        damage = find_damage(directory)
        why = f"it is damaged ({damage})" if damage else f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"model.path={config.path!r}: transformers cannot read {directory}/config.json: {why}."
        ) from error


def _overridden(model_config: Any, overrides: dict[str, Any]) -> Any:
    """Return the config with the fields replaced; it is built anew, so that transformers validates them."""
    if not overrides:
        return model_config
    values = model_config.to_dict()
    for name in overrides:
        if name not in values and not hasattr(model_config, name):
            raise ValueError(
                f"model.overrides.{name}: {type(model_config).__name__} has no such field.{suggest(name, values)}"
            )
    return type(model_config).from_dict({**values, **overrides})


def _read_tokenizer(path: str | None, directory: Path, config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    place = directory if path is None else find_model(path, weights=False, field="model.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except Exception as error:  # of many kinds, of which the Rust tokenizers raise plain Exception
        damage = find_damage(place)
        why = f"it is damaged: {damage}" if damage else f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"no tokenizer in {place} ({why}); set model.tokenizer to where it is.") from error


def _tokenizer_at_hand(config: ModelConfig, directory: Path | None, vocab_size: int) -> Any | None:
    """Return the tokenizer if it is here and fits the vocabulary: random weights can do without one."""
    if config.tokenizer is not None:
        return _read_tokenizer(config.tokenizer, Path(), config)  # checked against the model by the caller
    if directory is None:
        return None
    try:
        tokenizer = _read_tokenizer(None, directory, config)
    except ValueError:
        return None
    return tokenizer if len(tokenizer) <= vocab_size else None
