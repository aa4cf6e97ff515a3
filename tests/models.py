"""Tiny random decoders of every supported family, in float32, with attention that is far from uniform.

A random transformer as it comes attends almost uniformly, and a wrong mask would hardly move its logits. So queries
and keys are drawn large (`SHARPNESS`), norm weights and biases differ from token to token and head to head, and each
residual branch is about as large as what it is added to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Larger than the documents of most tests, so that these can have distinct ids: equal tokens have keys of equal norm in
# the first layer, and rounding alone would then decide what the knorm compressor keeps.
VOCAB_SIZE = 512
SHARPNESS = 1.8

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _draw_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(tensor.shape, generator=generator)

    config = model.config.get_text_config()
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.rsplit(".", 2)[-2]
            if name.endswith("bias"):
                parameter.copy_(draw(parameter, 0.3))
            elif owner == "embed_tokens":
                parameter.copy_(draw(parameter, 1.0))
            elif parameter.ndim == 1:
                sharpness = SHARPNESS if owner in ("q_norm", "k_norm") else 1.0
                parameter.copy_(sharpness * (1.0 + draw(parameter, 0.15)))
            else:
                parameter.copy_(draw(parameter, parameter.shape[1] ** -0.5))
                if owner in ("q_proj", "k_proj"):
                    parameter.mul_(SHARPNESS)
                elif owner == "qkv_proj":
                    head_dim = parameter.shape[0] // (heads + 2 * key_heads)
                    parameter[: (heads + key_heads) * head_dim].mul_(SHARPNESS)
                elif owner == "lm_head":
                    parameter.mul_(2.0)
    return model.eval().requires_grad_(False)


def _build(model_class: Callable[[Any], PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    state = torch.random.get_rng_state()
    try:
        return _draw_weights(model_class(config), seed)
    finally:
        torch.random.set_rng_state(state)


def llama(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Llama with grouped key/value heads and a default rotary embedding."""
    return _build(LlamaForCausalLM, LlamaConfig(**{**_SHAPE, **overrides}), seed)


def llama3_rope(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Llama with Llama 3.1's frequency scaling, its original length short enough to matter."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return llama(seed, rope_parameters=rope, **overrides)


def dynamic_rope(seed: int = 0, max_position_embeddings: int = 64, **overrides: Any) -> PreTrainedModel:
    """Llama whose frequencies depend on the largest position once it passes `max_position_embeddings`."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return llama(seed, rope_parameters=rope, max_position_embeddings=max_position_embeddings, **overrides)


def yi(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Yi-34B-200K in small: Llama's architecture, 7 query heads to a key/value head, rotary base 5,000,000."""
    shape = {
        "hidden_size": 112,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 200_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    }
    return llama(seed, **{**shape, **overrides})


def qwen2(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Qwen2: biases on queries, keys and values."""
    return _build(Qwen2ForCausalLM, Qwen2Config(**{**_SHAPE, "use_sliding_window": False, **overrides}), seed)


def qwen3(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Qwen3: queries and keys are normalised per head, and the head's size is not hidden / heads."""
    return _build(Qwen3ForCausalLM, Qwen3Config(**{**_SHAPE, "head_dim": 32, **overrides}), seed)


def mistral(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Mistral without a sliding window."""
    return _build(MistralForCausalLM, MistralConfig(**{**_SHAPE, "sliding_window": None, **overrides}), seed)


def phi3(seed: int = 0, original_length: int = 256, **overrides: Any) -> PreTrainedModel:
    """Phi-3: one fused projection, and longrope whose frequencies switch when a request passes `original_length`."""
    half = _SHAPE["hidden_size"] // _SHAPE["num_attention_heads"] // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + 1.5 * i for i in range(half)],
        "original_max_position_embeddings": original_length,
    }
    config = Phi3Config(
        **{
            **_SHAPE,
            "sliding_window": None,
            "rope_parameters": rope,
            "original_max_position_embeddings": original_length,
            **overrides,
        }
    )
    return _build(Phi3ForCausalLM, config, seed)


def phi3_switching(seed: int = 0) -> PreTrainedModel:
    """Phi-3 that switches within the tests' documents: early blocks alone would choose the other frequencies."""
    return phi3(seed, original_length=40)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "llama3_rope": llama3_rope,
    "dynamic_rope": dynamic_rope,
    "yi": yi,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "phi3": phi3,
    "phi3_switching": phi3_switching,
}


WINDOW = 20
_EAGER = {**_SHAPE, "attn_implementation": "eager"}  # families for which torch's own function does not do


def mistral_window(seed: int = 0) -> PreTrainedModel:
    """Mistral whose layers all attend within a window."""
    return mistral(seed, sliding_window=WINDOW)


def qwen2_mixed(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Qwen2 whose first layer attends to all tokens, and the others within a window."""
    windows = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return _build(Qwen2ForCausalLM, Qwen2Config(**{**_SHAPE, **windows, **overrides}), seed)


def gemma2(seed: int = 0) -> PreTrainedModel:
    """Gemma 2: every other layer attends within a window, and logits are capped."""
    config = Gemma2Config(
        **_EAGER, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, attn_logit_softcapping=6.0
    )
    return _build(Gemma2ForCausalLM, config, seed)


def gemma3(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Gemma 3: two layers within a window to one that sees all, each kind with its rotary frequencies."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    shape = {**_SHAPE, "num_hidden_layers": 4, "layer_types": kinds, **overrides}
    config = Gemma3TextConfig(**shape, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW)
    return _build(Gemma3ForCausalLM, config, seed)


def gemma3n(seed: int = 0) -> PreTrainedModel:
    """Gemma 3n: the last two layers attend to keys and values of earlier ones."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    shape = {**_SHAPE, "num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2}
    of_layers = {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4}
    inputs = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    config = Gemma3nTextConfig(**{**shape, **of_layers, **inputs}, head_dim=16, sliding_window=WINDOW)
    return _build(Gemma3nForCausalLM, config, seed)


def gpt_oss(seed: int = 0) -> PreTrainedModel:
    """GPT-OSS: sinks, every other layer within a window, experts."""
    shape = {**_EAGER, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**shape, head_dim=16, sliding_window=WINDOW)
    return _build(GptOssForCausalLM, config, seed)


def deepseek_v3(seed: int = 0) -> PreTrainedModel:
    """DeepSeek V3: latent attention, whose values are narrower than its keys."""
    latents = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    shape = {**_SHAPE, "num_key_value_heads": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
    return _build(DeepseekV3ForCausalLM, DeepseekV3Config(**shape, **latents, **experts), seed)


def qwen2_vl(seed: int = 0) -> PreTrainedModel:
    """Qwen2-VL, which sees images as well: its text part has rotary positions in three axes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    special = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
    config = Qwen2VLConfig(text_config={**_SHAPE, "rope_parameters": rope}, vision_config=vision, **special)
    return _build(Qwen2VLForConditionalGeneration, config, seed)


def gemma3_with_images(seed: int = 0) -> PreTrainedModel:
    """Gemma 3 from 4B on, which sees images as well."""
    text = {**gemma3(seed).config.to_dict(), "attn_implementation": "sdpa"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    special = {"image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
    return _build(Gemma3ForConditionalGeneration, config, seed)


# Families whose layers are not all attention to all tokens over what they cache, or that have other parts than text.
HYBRIDS: dict[str, Callable[..., PreTrainedModel]] = {
    "mistral_window": mistral_window,
    "qwen2_mixed": qwen2_mixed,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "qwen2_vl": qwen2_vl,
    "gemma3_with_images": gemma3_with_images,
}


def build_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a new model of `family`, of `FAMILIES` or `HYBRIDS`: equal seeds give equal weights in every process."""
    return (FAMILIES | HYBRIDS)[family](seed)


def distinct_ids(length: int, seed: int = 0) -> torch.Tensor:
    """Return ids of shape (1, length), int64, all different as long as the vocabulary lasts."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rounds = -(-length // VOCAB_SIZE)
    ids = torch.cat([torch.randperm(VOCAB_SIZE, generator=generator) for _ in range(rounds)])
    return ids[:length].unsqueeze(0)


def request_ids(document_length: int, query_length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a document and a query of distinct ids, shapes (1, document_length) and (1, query_length)."""
    ids = distinct_ids(document_length + query_length, seed)
    return ids[:, :document_length], ids[:, document_length:]
