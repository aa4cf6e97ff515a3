"""Adapters (peft) that change a model's weights: found, checked, and merged into the weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from apb_ds.loading.source import ADAPTER_CONFIG, find_files
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.utils.text import kind_and_line, list_some

FIELD = "model.adapter"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def merge_adapter(model: Any, path: str) -> Any:
    """Return the model with an adapter merged into its weights: as fast as the plain one, and of the same class.

    Parameters
    ----------
    model : transformers PreTrainedModel on its device; its weights change
    path : as `ModelConfig.adapter`

    Raises
    ------
    ValueError
        If the adapter is not found (saying where it was looked for), is damaged, does not fit the model, or cannot be
        merged.
    RuntimeError
        If peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise RuntimeError(f"{FIELD} needs the package peft; install it with: pip install -e '.[eval]'")
    directory = find_adapter(path)
    try:
        return _merge(model, directory, path)
    except Exception as error:  # of many kinds, from peft, safetensors, torch and pickle
        if is_out_of_memory(error) or str(error).startswith(FIELD):
            raise
        raise ValueError(
            f"{FIELD}={path!r}: peft cannot apply {directory} to a {type(model).__name__} ({kind_and_line(error)}); "
            "use one that was made for this model."
        ) from error


def find_adapter(path: str) -> Path:
    """Return the directory of an adapter, downloading a hub id that is not in the cache.

    Raises
    ------
    ValueError
        Saying what is missing, and where it was looked for.
    """
    directory = find_files(path, (ADAPTER_CONFIG, *WEIGHT_FILES), _missing, FIELD)
    missing = _missing(directory)
    if missing:
        raise ValueError(
            f"{FIELD}={path!r}: {directory.absolute()} is not an adapter, it lacks {', '.join(missing)}; use a folder "
            "that peft's save_pretrained wrote."
        )
    return directory


def _missing(directory: Path) -> list[str]:
    missing = [] if (directory / ADAPTER_CONFIG).is_file() else [ADAPTER_CONFIG]
    has_weights = any((directory / name).is_file() for name in WEIGHT_FILES)
    return missing if has_weights else [*missing, " or ".join(WEIGHT_FILES)]


def _merge(model: Any, directory: Path, path: str) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(directory))
    if config.is_prompt_learning:
        raise ValueError(
            f"{FIELD}={path!r} is of the type {config.peft_type.value}, which adds tokens and has no weights to merge; "
            "use one that changes weights, such as LoRA."
        )
    config.inference_mode = True
    weights = load_peft_weights(str(directory), device=str(model.device))
    adapted = PeftModel(model, config)
    expected = set(get_peft_model_state_dict(adapted))
    differing = sorted(expected ^ set(weights))
    if differing:  # peft only warns, and the model would answer as if nothing was wrong
        what = "lacks" if differing[0] in expected else "has, and the model has not,"
        raise ValueError(
            f"{FIELD}={path!r} does not fit this model: it {what} {list_some(differing)}; use one that was made for "
            "this model."
        )
    set_peft_model_state_dict(adapted, weights)
    return adapted.merge_and_unload(safe_merge=True)
