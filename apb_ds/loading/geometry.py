"""From a config.json or a geometry to the transformers config of a decoder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apb_ds.config import suggest
from apb_ds.loading.config import ModelConfig
from apb_ds.loading.damage import find_damage
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.utils.text import kind_and_line

USE_A_DECODER = "use a decoder such as llama, qwen2 or mistral"


def read_config(directory: Path, config: ModelConfig) -> Any:
    """Return the transformers config in a directory.

    Raises
    ------
    ValueError
        Saying what is wrong with config.json, or that it does not describe a causal language model.
    """
    from transformers import AutoConfig

    named = f"model.path={config.path!r}"
    try:
        found = AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of many kinds: a config may contain anything
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{named}: {_explain(directory / 'config.json', error)}") from error
    check_causal(named, found)
    return found


def _explain(file: Path, error: Exception) -> str:
    """Return why transformers cannot read this config.json, and what to do."""
    damage = find_damage([file])
    if damage is not None:
        return f"{file.parent} is damaged ({damage}); copy or download this file again."
    values = json.loads(file.read_text(encoding="utf-8"))
    if "auto_map" in values and "custom code" in str(error):
        return f"{file}: the model runs its own code; set model.trust_remote_code=true if you trust it."
    if "model_type" not in values:
        return f"{file} has no model_type; add the one that the model was saved with, such as llama."
    if "auto_map" not in values and not _is_known(values["model_type"]):
        return f"{file} has {_unknown(values['model_type'])}"
    return f"transformers cannot use {file} ({kind_and_line(error)}); correct this field."


def _known_types() -> Iterable[str]:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING.keys()


def _is_known(model_type: Any) -> bool:
    return isinstance(model_type, str) and model_type in _known_types()


def _unknown(model_type: Any) -> str:
    from transformers import __version__

    return (
        f"model_type={model_type!r}, which transformers {__version__} does not know; correct it, or install a version "
        f"that does.{suggest(model_type, _known_types())}"
    )


def make_config(geometry: dict[str, Any]) -> Any:
    """Return the transformers config with these fields, which include `model_type`.

    Raises
    ------
    ValueError
        Naming model.geometry and transformers' error.
    """
    from transformers import AutoConfig

    fields = copy.deepcopy(geometry)  # some families write into them
    model_type = fields.pop("model_type")
    if not _is_known(model_type):
        raise ValueError(f"model.geometry has {_unknown(model_type)}")
    try:
        made = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # of many kinds: each family checks its own fields
        raise ValueError(
            f"model.geometry does not make a transformers config ({kind_and_line(error)}); correct this field."
        ) from error
    check_causal("model.geometry", made)
    return made


def check_causal(named: str, model_config: Any) -> None:
    """Raise ValueError unless the config describes a decoder that predicts the next token."""
    from transformers.models.auto import modeling_auto as auto

    # The causal mapping includes encoders, for use as decoders; by default they attend to later tokens.
    fills_masks = model_config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if getattr(model_config, "is_encoder_decoder", False):
        kind = "it is an encoder-decoder"
    elif fills_masks and not getattr(model_config, "is_decoder", True):
        kind = "it is an encoder"
    elif type(model_config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(model_config, "auto_map"):
        return
    elif type(model_config) in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return  # it answers text alone as well
    else:
        kind = "transformers has no decoder of that type"
    raise ValueError(
        f"{named}: model_type={model_config.model_type!r} is not a causal language model, {kind}; {USE_A_DECODER}."
    )


def auto_class(model_config: Any) -> Any:
    """Return the class of transformers that makes the model of a config: with images or without."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    with_images = type(model_config) in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM


def override_config(model_config: Any, overrides: dict[str, Any]) -> Any:
    """Return the config with the fields replaced; rebuilding it makes transformers validate them.

    Fields of a multimodal model's text part may be given without ``text_config``.

    Raises
    ------
    ValueError
        For an unknown field, naming the nearest, or a value that transformers refuses.
    """
    if not overrides:
        return model_config
    values = model_config.to_dict()
    model_type = overrides.get("model_type", model_config.model_type)
    if model_type != model_config.model_type:
        raise ValueError(
            f"model_type={model_type!r} in model.overrides or model.geometry: the model is a "
            f"{model_config.model_type}, which cannot become another; for random weights of another type, set "
            "model.path=null, model.load_format=dummy and model.geometry."
        )
    if "text_config" in values and "text_config" not in overrides:
        known = model_config.get_text_config().to_dict()
        of_text = {name: value for name, value in overrides.items() if name in known and name not in values}
        overrides = {name: value for name, value in overrides.items() if name not in of_text}
        values["text_config"] |= of_text
    for name in overrides:
        if name not in values and not hasattr(model_config, name):
            raise ValueError(
                f"model.overrides.{name}: {type(model_config).__name__} has no such field.{suggest(name, values)}"
            )
    try:
        return type(model_config).from_dict({**values, **copy.deepcopy(overrides)})  # some families write into them
    except Exception as error:  # of many kinds: each family checks its own fields
        raise ValueError(
            f"model.overrides={overrides!r}: transformers refuses them ({kind_and_line(error)}); correct this field."
        ) from error


def keep_layers(model_config: Any, num_layers: int) -> None:
    """Cut the config's text part to its first layers; ValueError if it has fewer."""
    model_config = model_config.get_text_config()
    if num_layers > model_config.num_hidden_layers:
        raise ValueError(
            f"model.num_layers={num_layers} is more than the model has; use at most {model_config.num_hidden_layers}."
        )
    model_config.num_hidden_layers = num_layers
    if getattr(model_config, "layer_types", None):
        model_config.layer_types = model_config.layer_types[:num_layers]
