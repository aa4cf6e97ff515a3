"""Which transformers models APB serves, what it needs to know about them, and why it refuses the others."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from apb_ds.utils.sizes import AttentionSizes, read_attention_sizes

NO_WINDOWS: Mapping[int, int] = MappingProxyType({})


def attention_sizes(model: PreTrainedModel) -> AttentionSizes:
    """Read the attention's sizes from the model's config."""
    return read_attention_sizes(model.config)


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


# What the layer types of transformers' configs are, where they are not attention over all tokens or within a window.
OTHER_LAYERS = {
    "chunked_attention": "attends within chunks",
    "compressed_sparse_attention": "attends to what an indexer picks",
    "heavily_compressed_attention": "attends to what an indexer picks",
}
LAYER_TYPE_KEYS = ("layer_types", "layers_block_type", "block_types")
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, by name, what APB cannot serve. Nothing is run, moved or changed.

    Raises
    ------
    ValueError
        If the model is not a causal decoder with a language-model head over transformers' attention interface, if one
        of its layers is not plain softmax attention, or if some of its weights are not here.
    """
    _check_class(model)
    check_weights(model)
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; APB serves decoders.")
    if config.get_text_config() is not config:
        raise ValueError(
            f"{name} combines several models; APB serves decoders of text alone, loaded with AutoModelForCausalLM."
        )
    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError(f"{name} has no language-model head; load the model with AutoModelForCausalLM.")
    modules = attention_modules(model)
    layer_types = next((types for key in LAYER_TYPE_KEYS if (types := getattr(config, key, None))), None)
    layer_types = layer_types or ["full_attention"] * config.num_hidden_layers
    for layer_idx, layer_type in enumerate(layer_types):
        _check_layer_type(f"{name}, layer {layer_idx}, ", layer_type)
    if not modules:
        raise ValueError(f"{name} does not route its attention through transformers' AttentionInterface.")
    for layer_idx in range(config.num_hidden_layers):
        _check_attention(f"{name}, layer {layer_idx}", config, modules.get(layer_idx))
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"{name} shares keys and values between layers; APB serves layers with their own.")
    if getattr(config, "attn_temperature_tuning", None):
        raise ValueError(f"{name} scales its queries by their position (attn_temperature_tuning), which APB does not.")


def _check_class(model: Any) -> None:
    """Raise ValueError, saying what to pass instead, for what is not a transformers model."""
    if isinstance(model, PreTrainedModel):
        return
    name = type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        raise ValueError(f"model={str(model)!r} is a path or an id; load it with AutoModelForCausalLM.from_pretrained.")
    if hasattr(model, "merge_and_unload"):
        raise ValueError(f"model={name} holds an adapter; pass model.merge_and_unload().")
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"model={name} is compiled; pass model._orig_mod.")
    if isinstance(getattr(model, "module", None), nn.Module):
        raise ValueError(f"model={name} wraps a model; pass model.module.")
    raise ValueError(f"model={name} must be a transformers PreTrainedModel.")


def check_weights(model: nn.Module) -> None:
    """Raise ValueError, naming the first, if weights are without data or partitioned over other processes."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if hasattr(tensor, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, so its data is on other ranks. Load the model outside of "
                "ZeRO-3 (without HfDeepSpeedConfig or deepspeed.zero.Init)."
            )
        if isinstance(tensor.data, DTensor):
            raise ValueError(
                f"{name} is a DTensor, sharded over other processes. Load the model without tp_plan or FSDP."
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} has no data (device meta): the model was made with init_empty_weights, or a device_map or "
                "cpu_offload keeps its weights elsewhere. Load all weights onto one device."
            )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("deepspeed.module_inject"):
            raise ValueError(
                f"{name} ({type(module).__name__}) holds a part of its weights: DeepSpeed's tensor parallelism split "
                "the model. Load it without tensor_parallel."
            )


def _check_layer_type(where: str, layer_type: str) -> None:
    if layer_type in OTHER_LAYERS:
        raise ValueError(f"{where}{OTHER_LAYERS[layer_type]} ({layer_type}); APB serves attention over all tokens.")
    if layer_type not in ATTENTION_LAYERS:
        raise ValueError(f"{where}is a recurrent or convolution layer ({layer_type}); APB serves attention layers.")


def _check_attention(where: str, config: Any, module: nn.Module | None) -> None:
    if module is None:
        raise ValueError(f"{where}, has no attention module with a layer_idx; APB cannot tell its layers apart.")
    where = f"{where} ({type(module).__name__})"
    if module.is_causal is not True:
        raise ValueError(f"{where} does not attend causally (is_causal={module.is_causal}); APB serves decoders.")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{where} caps its logits (attn_logit_softcapping); APB serves plain softmax attention.")
    if hasattr(module, "sinks"):
        raise ValueError(f"{where} has attention sinks; APB serves plain softmax attention.")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"{where} is latent attention; APB serves attention with keys and values per head.")


def check_positions(model: PreTrainedModel, num_positions: int, windows: Mapping[int, int] = NO_WINDOWS) -> None:
    """Refuse a request that needs more positions than a layer's window or the model has.

    Parameters
    ----------
    num_positions : document, query and new tokens together
    windows : of the layers that attend within one, as `apb_ds.hf.probe.probe_model` found them
    """
    for layer_idx, window in sorted(windows.items()):
        if window < num_positions:
            kind = type(attention_modules(model)[layer_idx]).__name__
            raise ValueError(
                f"layer {layer_idx} ({kind}) attends within a window of sliding_window={window} tokens, shorter than "
                f"the {num_positions} positions of this request; APB serves full attention."
            )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or num_positions <= limit:
        return
    if not any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
        raise ValueError(
            f"the document, query and new tokens need {num_positions} positions; the model has "
            f"max_position_embeddings={limit}. Shorten them, or extend the model by rope scaling: set its config's "
            "rope_parameters to a scaled rotary embedding (yarn, dynamic, longrope) and max_position_embeddings to "
            f"at least {num_positions} (model.overrides in the configuration)."
        )
