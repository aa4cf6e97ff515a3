"""Which transformers models APB serves, what it needs to know about them, and why it refuses the others."""

from __future__ import annotations

import inspect
import itertools
import os
from collections import Counter
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from apb_ds.utils.sizes import AttentionSizes, read_attention_sizes


def attention_sizes(model: PreTrainedModel) -> AttentionSizes:
    """Read the attention's sizes from the model's config; ValueError if they differ between layers."""
    return read_attention_sizes(text_config(model))


def text_config(model: PreTrainedModel) -> Any:
    """Return the config of the model's text part: of all of it, unless it takes images or sound as well."""
    return model.config.get_text_config()


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of the model that makes hidden states of text."""
    decoder: Any = model.base_model if text_config(model) is model.config else model.get_decoder()
    return cast("PreTrainedModel", decoder)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the text decoder's attention modules by layer index."""
    return {module.layer_idx: module for module in _attention_modules(model)}  # type: ignore[misc]


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [
        module
        for module in text_decoder(model).modules()
        if hasattr(module, "is_causal") and isinstance(getattr(module, "layer_idx", None), int)
    ]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that hold the model's attention modules, in order."""
    attentions = {id(module): layer_idx for layer_idx, module in attention_modules(model).items()}
    layers = {}
    for module in model.modules():
        for child in module.children():
            if id(child) in attentions:
                layers[attentions[id(child)]] = module
    return [layers[layer_idx] for layer_idx in sorted(layers)]


def layers_elsewhere(model: nn.Module) -> set[int]:
    """Return the decoder layers that other stages of a pipeline have; see `apb_ds.hf.stages`."""
    return {module.elsewhere_idx for module in model.modules() if hasattr(module, "elsewhere_idx")}  # type: ignore[misc]


def walk(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules as ``modules()`` does, but in a fraction of the time, and shared ones more than once."""
    found = [model]
    for module in found:  # which grows
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it is in a model."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)


# What the layer types of transformers' configs are, where they are not attention over all tokens or within a window.
RECURRENT = "is a recurrent or convolution layer"
PICKED = "attends to what an indexer picks"
CHUNKED = "attends within chunks"
OTHER_LAYERS = {
    "linear_attention": RECURRENT,
    "mamba": RECURRENT,
    "recurrent": RECURRENT,
    "conv": RECURRENT,
    "hybrid": RECURRENT,
    "hybrid_sliding": RECURRENT,
    "indexed_attention": PICKED,
    "deepseek_sparse_attention": PICKED,
    "qwen_sparse_attention": PICKED,
    "compressed_sparse_attention": PICKED,
    "heavily_compressed_attention": PICKED,
    "minimax_m3_sparse": PICKED,
    "chunked_attention": CHUNKED,
    "local": CHUNKED,
    "lsh": CHUNKED,
}
LAYER_TYPE_KEYS = ("layer_types", "layers_block_type", "block_types", "attn_layers")
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")

# Names of modules that attend to another model's states.
CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")
# Attributes of modules that add to the scores what depends on the distance between tokens.
POSITION_BIASES = ("build_alibi_tensor", "build_mpt_alibi_tensor", "relative_attention_bias", "r_w_bias")
DYNAMIC_MASK = "prepare_dynamic_mask"
NOT_ROUTED = "computes attention itself, without transformers' AttentionInterface, through which APB runs."


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
    name, config = type(model).__name__, text_config(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; APB serves decoders.")
    _check_inputs(name, model)
    head = model.get_output_embeddings()
    if isinstance(head, nn.ModuleList):
        raise ValueError(
            f"{name} has {len(head)} output heads, one for each token of a step; APB serves decoders with one."
        )
    if head is None or not model.can_generate():
        raise ValueError(f"{name} has no language-model head; load the model with AutoModelForCausalLM.")
    if getattr(config, "num_hidden_layers", None) is None:
        raise ValueError(f"{name} is not one stack of decoder layers: its config has no num_hidden_layers.")
    layer_types = next((types for key in LAYER_TYPE_KEYS if (types := getattr(config, key, None))), None)
    for layer_idx, layer_type in enumerate(layer_types or ()):
        _check_layer_type(f"{name}, layer {layer_idx}, ", layer_type)
    _check_modules(name, model)
    modules = attention_modules(model)
    for layer_idx in sorted(set(range(config.num_hidden_layers)) - layers_elsewhere(model)):
        _check_attention(f"{name}, layer {layer_idx}", modules.get(layer_idx))
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
        raise ValueError(
            f"model={name} holds an adapter; pass model.merge_and_unload(), or model.get_base_model() to switch "
            "adapters between requests."
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"model={name} is compiled; pass model._orig_mod.")
    if isinstance(getattr(model, "module", None), nn.Module):
        check_weights(model)
        raise ValueError(f"model={name} wraps a model; pass model.module.")
    raise ValueError(f"model={name} must be a transformers PreTrainedModel.")


def check_weights(model: nn.Module) -> None:
    """Raise ValueError, naming the first, if weights are without data or sharded over other processes."""
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if isinstance(tensor.data, DTensor):
            by = "FSDP (fully_shard)" if by_fsdp else "DTensors, as transformers' tp_plan makes them,"
            _refuse_sharded(name, by, tensor.data.device_mesh.size())
        if hasattr(tensor, "_fsdp_flattened"):
            _refuse_sharded(name, "FSDP", torch.distributed.get_world_size())
        if hasattr(tensor, "ds_id") and not hasattr(model, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, but the model is not one that deepspeed.initialize has "
                "prepared to gather it. Pass deepspeed.initialize(model=model, config=...)[0].module."
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} has no data (device meta): the model was made with init_empty_weights, or a device_map or "
                "cpu_offload keeps its weights elsewhere. Load all weights onto one device."
            )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("deepspeed.module_inject"):
            num_ranks = getattr(module, "tp_world_size", "other")
            _refuse_sharded(f"{name}, {type(module).__name__}", "DeepSpeed's tensor_parallel", num_ranks)


def _refuse_sharded(name: str, by: str, num_ranks: int | str) -> NoReturn:
    raise ValueError(
        f"the model's weights are sharded by {by} over {num_ranks} ranks ({name}), which APB does not support. Pass a "
        "model with whole weights; shard_weights=True then shards them over the ranks."
    )


def _check_inputs(name: str, model: PreTrainedModel) -> None:
    """Raise ValueError if a forward needs more than ids."""
    _, *parameters = inspect.signature(type(model).forward).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if needed := [parameter for parameter in needed if parameter != "input_ids"]:
        raise ValueError(f"{name} needs {', '.join(needed)} in every forward; APB serves text alone.")


def _check_layer_type(where: str, layer_type: str) -> None:
    if layer_type in OTHER_LAYERS:
        raise ValueError(f"{where}{OTHER_LAYERS[layer_type]} ({layer_type}); which APB does not support.")
    if layer_type not in ATTENTION_LAYERS:
        raise ValueError(f"{where}has an unknown layer type ({layer_type}).")


def _check_modules(name: str, model: PreTrainedModel) -> None:
    """Raise ValueError for modules that make a decoder something else than one stack of causal self-attention."""
    for path, module in text_decoder(model).named_modules():
        if path.rpartition(".")[2] in CROSS_ATTENTION:
            raise ValueError(f"{name} attends to an encoder ({path}), as an encoder-decoder does; APB serves decoders.")
        bias = next((attribute for attribute in POSITION_BIASES if hasattr(module, attribute)), None)
        if bias is not None or getattr(text_config(model), "alibi", False):
            raise ValueError(
                f"{name} adds ALiBi or relative position biases to its scores ({bias or 'alibi'}); APB serves plain "
                "softmax attention."
            )
        if hasattr(module, DYNAMIC_MASK):
            raise ValueError(f"{name} selects keys by a mask computed from the values ({path}.{DYNAMIC_MASK}).")
    modules = _attention_modules(model)
    if not modules and model._is_stateful:
        raise ValueError(f"{name} keeps a recurrent state in place of keys and values; APB serves attention.")
    if not modules:
        raise ValueError(f"{name} {NOT_ROUTED}")
    layer_idx, count = Counter(module.layer_idx for module in modules).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{name} is not one stack of decoder layers: {count} attention modules are layer {layer_idx}.")


def _check_attention(where: str, module: nn.Module | None) -> None:
    if module is None:
        raise ValueError(f"{where}, has no attention module with a layer_idx; APB cannot tell its layers apart.")
    where = f"{where} ({type(module).__name__})"
    if module.is_causal is not True:
        raise ValueError(f"{where} does not attend causally (is_causal={module.is_causal}); APB serves decoders.")


def position_limit(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has; None where nothing limits them."""
    limit: int | None = getattr(text_config(model), "max_position_embeddings", None)
    is_scaled = any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules())
    return None if is_scaled else limit


def check_positions(model: PreTrainedModel, num_positions: int) -> None:
    """Refuse a request that needs more positions than the model has.

    Parameters
    ----------
    num_positions : document, query and new tokens together
    """
    limit = position_limit(model)
    if limit is not None and num_positions > limit:
        raise ValueError(
            f"the document, query and new tokens need {num_positions} positions; the model has "
            f"max_position_embeddings={limit}. Shorten them, or extend the model by rope scaling: set its config's "
            "rope_parameters to a scaled rotary embedding (yarn, dynamic, longrope) and max_position_embeddings to "
            f"at least {num_positions} (model.overrides in the configuration)."
        )
