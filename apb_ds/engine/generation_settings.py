"""Which of transformers' generation settings the engine takes, and how it reads them."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from apb_ds.config import suggest

DEFAULT_NEW_TOKENS = 20  # transformers' own default

# Generation settings that the engine fixes: name -> the only value it takes.
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
KNOWN_ARGUMENTS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
    "attention_mask",
)
FIXED_ARGUMENTS = ("assistant_model", "past_key_values", "custom_generate", "synced_gpus", "inputs_embeds", "inputs")


def check_generate_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for `generate`, without a mask that hides nothing.

    Raises
    ------
    ValueError
        For what `generate` would accept and the engine cannot do.
    """
    mask = arguments.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("attention_mask hides tokens; pass one unpadded sequence.")
    for name, allowed in FIXED_SETTINGS.items():
        value = _setting(model, arguments, name)
        if value is not None and value != allowed:
            raise ValueError(
                f"{name}={value!r} is not supported: the engine decodes one sequence with {name}={allowed}."
            )
    for name in FIXED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is not supported: the engine sets it itself, or decodes without it.")
    known = {*KNOWN_ARGUMENTS, *FIXED_SETTINGS, *FIXED_ARGUMENTS, *vars(GenerationConfig())}
    for name in arguments:
        if name not in known:
            raise ValueError(f"{name} is not an argument of generate that the engine knows.{suggest(name, known)}")
    if _setting(model, arguments, "stop_strings") is not None and arguments.get("tokenizer") is None:
        raise ValueError("stop_strings needs tokenizer=..., so that text can be compared.")
    return {name: value for name, value in arguments.items() if name != "attention_mask"}


def _setting(model: PreTrainedModel, arguments: dict[str, Any], name: str) -> Any:
    """Return a setting as `generate` resolves it: the argument, else generation_config's, else the model's."""
    if arguments.get(name) is not None:
        return arguments[name]
    configs = (arguments.get("generation_config"), model.generation_config)
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def arguments_for_loop(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as transformers' `generate` takes them together with a decoding loop and max_new_tokens.

    Stop strings become a stopping criterion: `generate` drops the tokenizer when it is given a decoding loop.
    """
    arguments = {name: value for name, value in arguments.items() if name != "max_length"}
    stop_strings = _setting(model, arguments, "stop_strings")
    if stop_strings is None:
        return arguments
    criterion = StopStringCriteria(arguments["tokenizer"], stop_strings)
    criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), criterion])
    return {**arguments, "stop_strings": None, "stopping_criteria": criteria}


def count_new_tokens(model: PreTrainedModel, max_new_tokens: int | None, arguments: dict[str, Any], known: int) -> int:
    """Return how many tokens may be generated after `known` ones, as `generate` will understand its arguments."""
    if max_new_tokens is None:
        max_new_tokens = _setting(model, arguments, "max_new_tokens")
    if max_new_tokens is None:
        max_length = _setting(model, arguments, "max_length")
        max_new_tokens = max_length - known if max_length is not None else DEFAULT_NEW_TOKENS
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 1.")
    return max_new_tokens
