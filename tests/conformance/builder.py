"""A tiny random decoder of any type that transformers knows, in float32, with attention that is far from uniform.

One rule shrinks every config: sizes by the name of the field, and as many layers as it takes for every kind of layer
of the default config to occur. `SETTINGS` holds what a type needs besides. Weights are drawn as in `tests.models`, by
the names of the parameters: queries and keys large, norms and biases varied, so that the logits show a wrong mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.conformance.settings import SETTINGS, VARIANTS

VOCAB_SIZE = 256
# Ids that configs may use for padding, images and the like are below or above these.
ORDINARY_IDS = range(16, 240)
WINDOW = 12
MIN_LAYERS = 3
SHARPNESS = 1.8

# What a field of a config is at most: sizes, and the fields.
_FIELDS_BY_SIZE: dict[int, str] = {
    64: (
        "hidden_size d_model n_embd emb_dim embed_dim embedding_dim embedding_size word_embed_proj_dim "
        "input_embedding_size output_embedding_size attention_hidden_size backbone_hidden_size adapter_in_dim "
        "adapter_out_dim adapter_input_size out_hidden_size lru_width dim_model_base pronunciation_embed_dim "
        "shape_embed_dim ple_embed_dim"
    ),
    96: (
        "intermediate_size moe_intermediate_size dense_intermediate_size intermediate_size_mlp "
        "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size ffn_dim d_inner "
        "decoder_ffn_dim encoder_ffn_dim dff dim_ff feed_forward_size router_hidden_size"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads index_n_heads num_query_groups linear_num_heads linear_num_value_heads "
        "linear_num_key_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
        "moe_topk moe_k type_vocab_size index_topk_blocks"
    ),
    16: (
        "head_dim kv_channels d_head attention_head_size dim_head attention_head_dim qk_nope_head_dim "
        "v_head_dim swa_head_dim global_head_dim index_head_dim linear_head_dim linear_key_head_dim "
        "linear_value_head_dim query_pre_attn_scalar index_topk patch_size"
    ),
    8: "qk_rope_head_dim rotary_dim laurel_rank hidden_size_per_layer_input index_block_size",
    24: "q_lora_rank o_lora_rank",
    32: "kv_lora_rank image_size",
    1: (
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "first_k_dense_replace num_dense_layers num_nextn_predict_layers"
    ),
    VOCAB_SIZE: (
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size shape_vocab_size "
        "pronunciation_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab"
    ),
    WINDOW: (
        "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size "
        "keep_window_size local_attention local_attention_window_len"
    ),
    512: (
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions "
        "max_source_positions context_length"
    ),
}
SIZES = {field: size for size, fields in _FIELDS_BY_SIZE.items() for field in fields.split()}
LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks"),
    *("encoder_layers", "num_encoder_layers", "layers", "depth"),
)
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")
LAYER_KINDS = ("layer_types", "layers_block_type")
LISTS_BY_LAYER = ("intermediate_size", "indexer_types", "activation_sparsity_pattern", "layers_block_type")
LAYER_LISTS = ("moe_layers", "mlp_only_layers")  # of indices
LATENT = "kv_lora_rank"


def build(name: str, *, is_wrapper: bool = False) -> PreTrainedModel:
    """Return a tiny model of this type or variant; equal in every process.

    Parameters
    ----------
    name : a type of transformers, or a key of `VARIANTS`
    is_wrapper : of AutoModelForImageTextToText, not of AutoModelForCausalLM

    Raises
    ------
    Exception
        Whatever transformers raises for a config that the rule does not suit.
    """
    model_type, settings = VARIANTS.get(name, (name, SETTINGS.get(name, {})))
    auto = AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
    config = tiny_config(CONFIG_MAPPING[model_type], settings)
    model_class = auto._model_mapping[type(config)]
    config = _part_for(model_class.config_class, config)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
        draw_weights(model)
    finally:
        torch.random.set_rng_state(state)
    return model.eval().requires_grad_(False)


def _part_for(config_class: type[PretrainedConfig], config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that is of this class; the config itself if none is."""
    return next((part for part in vars(config).values() if type(part) is config_class), config)


def tiny_config(config_class: type[PretrainedConfig], settings: dict[str, Any]) -> PretrainedConfig:
    """Return a small config of this class, by the common rule and by `settings`, which go before it."""
    try:
        default = config_class()
    except Exception:  # a class without defaults
        return config_class(**settings)
    return config_class(**{**settings, **_shrunk(default, settings)})


def _shrunk(config: PretrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that make such a config small."""
    present = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = _chosen_layers(present)
    num_layers = next((len(settings[name]) for name in LAYER_KINDS if name in settings), len(layers))
    layers = (layers + layers[-1:] * num_layers)[:num_layers]
    values: dict[str, Any] = {}
    for name, value in present.items():
        if isinstance(value, PretrainedConfig):
            values[name] = tiny_config(type(value), settings.get(name, {}))
        elif name in settings:
            values[name] = settings[name]
        elif name in LAYER_COUNTS:
            values[name] = num_layers
        elif _is_by_layer(name, value, _num_layers(present)):
            values[name] = [_small(name, value[layer]) for layer in layers]
        else:
            values[name] = _small(name, value)
    if present.get(LATENT) is not None:  # as many keys as queries; head_dim follows from the parts of a head
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
        values["head_dim"] = settings.get("head_dim", present.get("head_dim"))
    fields = {field.name for field in dataclasses.fields(type(config)) if field.init}  # type: ignore[arg-type]
    # A field may be kept under another name.
    fields_of = {kept: name for name, kept in config.attribute_map.items() if name in fields}
    fields_of |= {name: name for name in [*fields, *SPECIAL_IDS]}
    changed = {name: value for name, value in values.items() if value is not present.get(name)}
    return {fields_of[name]: value for name, value in changed.items() if name in fields_of}


def _small(name: str, value: Any) -> Any:
    """Return a value that is small enough, or the value itself."""
    if name in SPECIAL_IDS and value is not None:
        return SPECIAL_IDS.index(name)
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
        return ORDINARY_IDS.stop
    if name == "is_decoder":
        return True
    if name == "head_dim" and value is None:
        return SIZES[name]
    return min(value, SIZES[name]) if name in SIZES and type(value) is int else value


def _num_layers(present: dict[str, Any]) -> int:
    return next((present[name] for name in LAYER_COUNTS if isinstance(present.get(name), int)), 0)


def _is_by_layer(name: str, value: Any, count: int) -> bool:
    """Whether a field has an entry for every layer."""
    is_list = isinstance(value, (list, tuple)) and len(value) == count
    return is_list and ("layer" in name or name in LISTS_BY_LAYER) and name not in LAYER_LISTS


def _chosen_layers(present: dict[str, Any]) -> list[int]:
    """Return which layers of the default config to keep: every kind, at least `MIN_LAYERS` of them.

    Layers are of one kind if all lists with an entry per layer agree on them.
    """
    count = _num_layers(present)
    lists = [value for name, value in present.items() if _is_by_layer(name, value, count)]
    kinds = [repr([entries[layer] for entries in lists]) for layer in range(count)]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    # One of the first kind after the others, so that no layer type comes only before another.
    repeats = [layer for layer in range(count) if layer not in firsts and layer > max(firsts, default=0)]
    repeats.sort(key=lambda layer: firsts.index(kinds.index(kinds[layer])))
    lacking = max(MIN_LAYERS - len(firsts), 1 if len(firsts) > 1 else 0)
    return sorted(firsts + repeats[:lacking])


# --- weights


def draw_weights(model: nn.Module) -> None:
    """Draw every parameter anew, by what its name says it is; integers and buffers stay."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(_drawn(name, parameter, generator))


def _drawn(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    owner, kind = ["", *name.split(".")][-2:]
    if parameter.ndim >= 2:
        drawn = noise * parameter.shape[-1] ** -0.5
        if "embed" in owner or owner in ("wte", "wpe", "word_embeddings"):
            return 0.25 * noise  # some models scale it up, and it must not outweigh what attention adds
        if _projects_to_keys_or_queries(name):
            return drawn * SHARPNESS
        return drawn
    if kind == "sinks":
        return noise
    if kind.endswith("bias"):
        return 0.3 * noise
    if parameter.ndim == 0 or kind in ("A_log", "D"):
        return parameter
    sharper = SHARPNESS - 1 if any(part in owner for part in ("q_norm", "k_norm", "query_norm", "key_norm")) else 0.0
    return parameter + sharper + 0.15 * noise


def _projects_to_keys_or_queries(name: str) -> bool:
    parts = ("q_proj", "k_proj", "qkv", "query", "key", "c_attn", "q_b_proj", "kv_b_proj", "q_lin", "k_lin", "in_proj")
    return any(part in name for part in parts)
