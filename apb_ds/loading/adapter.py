"""Adapters (peft) that change a model's weights: found, checked, and merged into the weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from apb_ds.loading.source import ADAPTER_CONFIG, find_files
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.utils.text import kind_and_line, list_some
from apb_ds.weights.cut import own_rows, rows_as_whole

FIELD = "model.adapter"
# Of `init_lora_weights`: they change the model's weights by what a decomposition of them gives.
INITS_FROM_WEIGHTS = ("pissa", "corda", "olora", "loftq")
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def merge_adapter(model: Any, path: str, part: tuple[int, int] | None = None) -> Any:
    """Return the model with an adapter merged into its weights: as fast as the plain one, and of the same class.

    Parameters
    ----------
    model : transformers PreTrainedModel on its device; its weights change
    path : as `ModelConfig.adapter`
    part : rank and number of ranks, of a model whose linear layers have this rank's rows alone: only these are merged

    Raises
    ------
    ValueError
        If the adapter is not found (saying where it was looked for), is damaged, does not fit the model, or cannot be
        merged, or not by rows.
    RuntimeError
        If peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise RuntimeError(f"{FIELD} needs the package peft; install it with: pip install -e '.[eval]'")
    directory = find_adapter(path)
    try:
        return _merge(model, directory, path, part or (0, 1))
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


def _merge(model: Any, directory: Path, path: str, part: tuple[int, int]) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(directory))
    if config.is_prompt_learning:
        raise ValueError(
            f"{FIELD}={path!r} is of the type {config.peft_type.value}, which adds tokens and has no weights to merge; "
            "use one that changes weights, such as LoRA."
        )
    config.inference_mode = True
    weights = load_peft_weights(str(directory), device=str(model.device))
    with rows_as_whole(model, *part) as channels:
        if channels:
            _check_config_by_rows(config, path)
        adapted = PeftModel(model, config)
        _prepare_rows(adapted, channels, path)
        expected = get_peft_model_state_dict(adapted)
        differing = sorted(set(expected) ^ set(weights))
        if differing:  # peft only warns, and the model would answer as if nothing was wrong
            what = "lacks" if differing[0] in expected else "has, and the model has not,"
            raise ValueError(
                f"{FIELD}={path!r} does not fit this model: it {what} {list_some(differing)}; use one that was made "
                "for this model."
            )
        for name, number in channels.items():
            for key in (key for key in expected if f".{name}." in key):
                if weights[key].shape == (number, *expected[key].shape[1:]) != expected[key].shape:
                    weights[key] = own_rows(weights[key], *part)
        set_peft_model_state_dict(adapted, weights)
        return adapted.merge_and_unload(safe_merge=True)


def _check_config_by_rows(config: Any, path: str) -> None:
    """Raise ValueError if putting the adapter into a model changes weights in a way that is not by rows."""
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(INITS_FROM_WEIGHTS):
        raise _not_by_rows(path, f"init_lora_weights={init} decomposes whole weights")
    if getattr(config, "layer_replication", None):
        raise _not_by_rows(path, "layer_replication adds layers to the model")


def _prepare_rows(adapted: Any, channels: dict[str, int], path: str) -> None:
    """Give layers that are cut whole biases; raise ValueError if one of them is changed in a way that is not by rows.

    Parameters
    ----------
    channels : of all ranks together, by the name of each layer that is cut
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils import ModulesToSaveWrapper

    for name, number in channels.items():
        module: Any = adapted.base_model.model.get_submodule(name)
        kind = type(module)
        if kind is Linear:
            variants = list(module.lora_variant.values())
            if any(type(variant) is not DoraLinearVariant for variant in variants):
                raise _not_by_rows(path, f"{name} would be changed by {type(variants[0]).__name__}")
            for high in module.lora_B.values():
                if high.bias is not None:
                    high.bias = torch.nn.Parameter(high.bias.new_zeros(number))
        elif kind not in (torch.nn.Linear, ModulesToSaveWrapper):
            of_type = adapted.active_peft_config.peft_type.value
            raise _not_by_rows(path, f"{name} would be changed by {kind.__name__} of the type {of_type}")


def _not_by_rows(path: str, reason: str) -> ValueError:
    return ValueError(
        f"{FIELD}={path!r}: {reason}, and model.shard_weights gives each rank some rows of a weight alone; merge it "
        "once with peft's merge_and_unload, save the model, and give that as model.path."
    )
