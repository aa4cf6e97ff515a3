"""What is expected of each type: exact, unless it is here with the category of its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """Why a family is refused.

    Attributes
    ----------
    reason : for docs/models.md
    pattern : regular expression that a refusal for this reason matches
    families : types of the causal-LM mapping whose modelling code does this
    """

    reason: str
    pattern: str
    families: tuple[str, ...]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CATEGORIES = {
    "recurrent": Category(
        "recurrent or convolution layers",
        r"recurrent or convolution layer|keeps a recurrent state",
        _names(
            "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_text inkling_text jamba kimi_linear "
            "lfm2 lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text "
            "qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya"
        ),
    ),
    "chunked": Category("chunked attention", r"within chunks", _names("llama4 llama4_text reformer")),
    "indexer": Category(
        "an indexer or a dynamic mask picks what a token attends to",
        r"attends to what .* picks|selects keys by a mask",
        _names("axk2 deepseek_v32 deepseek_v4 doge dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text"),
    ),
    "bias": Category(
        "ALiBi or relative position biases", r"ALiBi or relative position biases", _names("bloom cpmant mpt xlnet")
    ),
    "encoder": Category(
        "encoder-decoder: attends to an encoder's states",
        r"attends to an encoder",
        _names(
            "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mllama mvp pegasus plbart prophetnet trocr "
            "whisper"
        ),
    ),
    "stack": Category(
        "not one decoder with one head",
        r"not one stack of decoder layers|output heads, one for each token",
        _names("blt hrm_text musicgen musicgen_melody"),
    ),
    "own": Category(
        "computes attention without transformers' AttentionInterface",
        r"without transformers' AttentionInterface",
        _names(
            "big_bird codegen falcon git gpt_neo gpt_neox_japanese gptj megatron-bert openai-gpt rembert roformer xglm "
            "xlm"
        ),
    ),
    "inputs": Category("needs images in every forward", r"needs .* in every forward", ()),
    "twice": Category("two attentions in a layer", r"calls .* 2 times", _names("diffllama")),
    "positions": Category(
        "positions do not start at 0",
        r"does not number positions from 0",
        _names("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod"),
    ),
}
# Types of which transformers cannot build a tiny model, and the pattern of the error.
UNBUILT = {
    "gemma3n": r"requires the timm library",
    "gemma4_assistant": r"set of layer types producing a cache",
    "gemma4_unified_assistant": r"set of layer types producing a cache",
}
VARIANT_CATEGORIES = {"falcon with ALiBi": "bias"}
WRAPPER_CATEGORIES = {
    "blip-2": "inputs",
    "kosmos-2.5": "positions",
    "llama4": "chunked",
    "minimax_m3_vl": "indexer",
    "mllama": "encoder",
    "qwen3_5": "recurrent",
}

# By type of the causal-LM mapping, or variant, what it is refused for.
EXPECTED = {family: key for key, category in CATEGORIES.items() for family in category.families}
EXPECTED |= VARIANT_CATEGORIES


def category_of(reason: str) -> str | None:
    """Return the category that a refusal's message belongs to; None if it belongs to no category."""
    return next((key for key, category in CATEGORIES.items() if re.search(category.pattern, reason)), None)
