"""Which of transformers' generation settings the engine takes, and how it reads them."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from apb_ds.config import suggest
from apb_ds.engine.stop_text import StopText

DEFAULT_NEW_TOKENS = 20  # transformers' own default
MODELS_FILE = "the model's generation_config.json"

logger = logging.getLogger(__name__)

# Generation settings that the engine fixes: name -> the only value it takes. Other values are refused if the caller
# asks for them, and overridden if the model's own generation_config.json has them.
FIXED_SETTINGS: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prefill_chunk_size": None,
    "cache_implementation": None,
    "return_dict_in_generate": False,
    "guidance_scale": 1.0,
    "token_healing": False,
}
# Nothing is hidden, and ranks always go on until all have ended.
DROPPED_ARGUMENTS = ("attention_mask", "synced_gpus")
KNOWN_ARGUMENTS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
    *DROPPED_ARGUMENTS,
)
# Overriding these changes answers, so it is logged.
ANSWERS_DEPEND_ON = (
    "num_beams",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "guidance_scale",
    "token_healing",
)
FIXED_ARGUMENTS = ("assistant_model", "past_key_values", "custom_generate", "inputs_embeds")


def check_generate_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for `generate`: without a mask that hides nothing, with what the engine overrides.

    Raises
    ------
    ValueError
        For what `generate` would accept and the engine cannot do.
    """
    mask = arguments.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("attention_mask hides tokens; pass one unpadded sequence.")
    for name, allowed in FIXED_SETTINGS.items():
        value = _asked(arguments, name)
        if value is not None and value != allowed:
            raise ValueError(
                f"{name}={value!r} is not supported: the engine decodes one sequence with {name}={allowed}."
            )
    sequences = getattr(model.generation_config, "num_return_sequences", None)
    if sequences not in (None, 1):  # transformers' own generate fails on it before it looks at arguments
        raise ValueError(f"num_return_sequences={sequences} in {MODELS_FILE} is not supported; set it to 1 there.")
    for name in FIXED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is not supported: the engine sets it itself, or decodes without it.")
    known = {*KNOWN_ARGUMENTS, *FIXED_SETTINGS, *FIXED_ARGUMENTS, *vars(GenerationConfig())}
    for name in arguments:
        if name not in known:
            raise ValueError(f"{name} is not an argument of generate that the engine knows.{suggest(name, known)}")
    _check_stop_strings(model, arguments)
    return {name: value for name, value in arguments.items() if name not in DROPPED_ARGUMENTS} | _overrides(model)


def _check_stop_strings(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    value = _setting(model, arguments, "stop_strings")
    if value is None:
        return
    origin = "" if _asked(arguments, "stop_strings") is not None else f" (from {MODELS_FILE})"
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop_strings={value!r}{origin} must be a text or a list of texts, none of them empty.")
    if arguments.get("tokenizer") is None:
        raise ValueError(f"stop_strings{origin} needs tokenizer=..., so that text can be compared.")


def _overrides(model: PreTrainedModel) -> dict[str, Any]:
    """Return the fixed settings that the model's own generation config sets otherwise, with the engine's values."""
    values = {name: getattr(model.generation_config, name, None) for name in FIXED_SETTINGS}
    return {name: FIXED_SETTINGS[name] for name, value in values.items() if value not in (None, FIXED_SETTINGS[name])}


def warn_of_overrides(model: PreTrainedModel) -> None:
    """Log which settings of the model's own generation config the engine ignores, if answers depend on them."""
    ignored = [name for name in _overrides(model) if name in ANSWERS_DEPEND_ON]
    if ignored:
        shown = ", ".join(f"{name}={getattr(model.generation_config, name)!r}" for name in ignored)
        logger.warning("The engine decodes one sequence and ignores %s of %s.", shown, MODELS_FILE)


def _asked(arguments: dict[str, Any], name: str) -> Any:
    """Return a setting as the caller gave it: the argument, else that of generation_config."""
    value = arguments.get(name)
    return getattr(arguments.get("generation_config"), name, None) if value is None else value


def _setting(model: PreTrainedModel, arguments: dict[str, Any], name: str) -> Any:
    """Return a setting as `generate` resolves it: the caller's, else the model's."""
    value = _asked(arguments, name)
    return getattr(model.generation_config, name, None) if value is None else value


def arguments_for_loop(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as transformers' `generate` takes them together with a decoding loop and max_new_tokens.

    Stop strings become a stopping criterion: transformers' own takes 0.3 s to make, and `generate` drops the tokenizer
    when it is given a decoding loop.
    """
    arguments = {name: value for name, value in arguments.items() if name != "max_length"}
    stop_strings = _setting(model, arguments, "stop_strings")
    if stop_strings is None:
        return arguments
    criterion = StopText(arguments["tokenizer"], stop_strings)
    criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), criterion])
    return {**arguments, "stop_strings": None, "stopping_criteria": criteria}


def count_new_tokens(model: PreTrainedModel, max_new_tokens: int | None, arguments: dict[str, Any], known: int) -> int:
    """Return how many tokens may be generated after `known` ones, as `generate` will understand its arguments."""
    if max_new_tokens is None:
        max_new_tokens = _setting(model, arguments, "max_new_tokens")
    max_length = _setting(model, arguments, "max_length")
    if max_new_tokens is None and max_length is not None:
        origin = "" if _asked(arguments, "max_length") is not None else f" (from {MODELS_FILE})"
        if max_length <= known:
            raise ValueError(
                f"max_length={max_length}{origin} leaves no room after {known} tokens of document and query; pass "
                "max_new_tokens."
            )
        return int(max_length - known)
    if max_new_tokens is None:
        return DEFAULT_NEW_TOKENS
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 1.")
    return max_new_tokens


def padding_token(model: PreTrainedModel, arguments: dict[str, Any]) -> int | None:
    """Return the token with which `generate` fills rows that ended early: an end token if there is no other."""
    token = _setting(model, arguments, "pad_token_id")
    ends = end_tokens(model, arguments)
    return ends[0] if token is None and ends else token


def end_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> list[int]:
    """Return the tokens that end an answer."""
    ends = _setting(model, arguments, "eos_token_id")
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
