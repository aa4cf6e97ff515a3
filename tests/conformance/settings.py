"""What the common rule of `tests.conformance.builder` does not suit, by type."""

from __future__ import annotations

from typing import Any

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
# The last two layers use the keys and values of the last layers of their type before them.
_SHARED_KV: dict[str, Any] = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": _SLIDING_AND_FULL * 3}
_ASSISTED: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": _SLIDING_AND_FULL,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 12,
}
_WINDOW_ON: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 12}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_MROPE: dict[str, Any] = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL * 2,
        "rope_parameters": {kind: {**_ROPE, "mrope_section": [2, 3, 3]} for kind in _SLIDING_AND_FULL},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 24,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {**_SHARED_KV, "intermediate_size": [96] * 6, "activation_sparsity_pattern": [0.5, *[0.0] * 5]},
    "gemma4": {"text_config": {**_SHARED_KV, "global_head_dim": 32}},
    "gemma4_assistant": {
        "text_config": {**_ASSISTED, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        "backbone_hidden_size": 64,
    },
    "gemma4_text": {**_SHARED_KV, "global_head_dim": 32},
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified_assistant": {"text_config": _ASSISTED, "backbone_hidden_size": 64},
    "gemma4_unified_text": {"global_head_dim": 32},
    "glm4v": {"text_config": _MROPE},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4},
    "laguna": {"layer_types": _SLIDING_AND_FULL * 2, "num_attention_heads_per_layer": [4, 8] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 8},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "mellum": {"layer_types": _SLIDING_AND_FULL * 2},
    "mimo_v2_flash": {"head_dim": 24},  # not the values'
    "minimax_m3_vl": {"text_config": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "modernbert-decoder": {"local_attention": 24},  # to either side together
    # Its masks have no window, but transformers' cache drops what is beyond it.
    "moshi": {"sliding_window": 512},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE, "vision_config": {"num_heads": 4}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}

# What the default config of a type leaves off, but published models have: name -> (type, settings).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    "phi3 with a window": ("phi3", {"sliding_window": 12}),
    "qwen2 with windows": ("qwen2", {"layer_types": _SLIDING_AND_FULL * 2, **_WINDOW_ON}),
    "starcoder2 with a window": ("starcoder2", {"sliding_window": 12}),
}

# Multimodal types, of AutoModelForImageTextToText, to be asked about text.
WRAPPERS = (
    *(
        "aria",
        "aya_vision",
        "blip-2",
        "cohere2_vision",
        "gemma3",
        "gemma4",
        "glm4v",
        "idefics3",
        "internvl",
        "kimi_k25",
        "kosmos-2.5",
    ),
    *("llama4", "llava", "llava_onevision", "minimax_m3_vl", "mistral3", "mistral4", "mllama", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "smolvlm"),
)
