"""Which transformers models APB serves, what it needs to know about them, and why it refuses the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of a decoder's attention."""

    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int


def attention_sizes(model: PreTrainedModel) -> AttentionSizes:
    """Read the attention's sizes from the model's config."""
    config = model.config
    heads = config.num_attention_heads
    return AttentionSizes(
        num_layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the model's attention modules by layer index."""
    modules = (module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx"))
    return {int(module.layer_idx): module for module in modules}  # type: ignore[arg-type]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that hold the model's attention modules, in order."""
    attentions = {id(module): layer_idx for layer_idx, module in attention_modules(model).items()}
    layers = {}
    for module in model.modules():
        for child in module.children():
            if id(child) in attentions:
                layers[attentions[id(child)]] = module
    return [layers[layer_idx] for layer_idx in sorted(layers)]


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, by name, what APB cannot serve.

    Raises
    ------
    ValueError
        If the model is not a causal decoder over transformers' attention interface, or one of its layers is not plain
        softmax attention.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model={name} must be a transformers PreTrainedModel.")
    config = model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; APB serves decoders.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not route its attention through transformers' AttentionInterface.")
    if config.get_text_config() is not config:
        raise ValueError(f"{name} combines several models; APB serves plain decoders. Use its language model.")
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"{name} shares keys and values between layers; APB serves layers with their own.")
    modules = attention_modules(model)
    for layer_idx in range(config.num_hidden_layers):
        _check_layer(name, config, layer_idx, modules.get(layer_idx))


def _check_layer(name: str, config: Any, layer_idx: int, module: nn.Module | None) -> None:
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[layer_idx] if layer_types else "full_attention"
    where = f"{name}, layer {layer_idx}"
    if module is None or layer_type not in ("full_attention", "sliding_attention"):
        raise ValueError(f"{where} ({layer_type}) is not softmax attention; APB cannot serve it.")
    kind = type(module).__name__
    if getattr(config, "attn_logit_softcapping", None) is not None or hasattr(module, "sinks"):
        raise ValueError(
            f"{where} ({kind}) caps its logits or has attention sinks; APB serves plain softmax attention."
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"{where} ({kind}) is latent attention; APB serves attention with keys and values per head.")


def check_positions(model: PreTrainedModel, num_positions: int) -> None:
    """Refuse a request that needs more positions than a layer's window or the model has.

    Parameters
    ----------
    num_positions : document, query and new tokens together
    """
    config: Any = model.config
    layer_types = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    is_short = window is not None and window < num_positions
    for layer_idx, module in sorted(attention_modules(model).items()) if is_short else ():
        if layer_types is None or layer_types[layer_idx] == "sliding_attention":
            raise ValueError(
                f"layer {layer_idx} ({type(module).__name__}) attends within a window of sliding_window={window} "
                f"tokens, shorter than the {num_positions} positions of this request; APB serves full attention."
            )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or num_positions <= limit:
        return
    if not any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
        raise ValueError(
            f"the document, query and new tokens need {num_positions} positions; the model has "
            f"max_position_embeddings={limit}. Shorten them, or extend the model by rope scaling: set its config's "
            "rope_parameters to a scaled rotary embedding (yarn, dynamic, longrope) and max_position_embeddings to "
            f"at least {num_positions} (model.overrides in the configuration)."
        )
