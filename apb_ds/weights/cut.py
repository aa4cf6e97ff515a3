"""Which linear layers of a model are cut, and cutting them one by one while they are loaded or made."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading

from apb_ds.hf.architecture import decoder_layers

# Read by transformers: load one weight after the other, so that no more than one is whole at a time.
ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
DUMMY_STD = 0.02


def rows_of(num_channels: int, world_size: int) -> int:
    """Return how many output channels each rank holds, the last ones padded."""
    return -(-num_channels // world_size)


def own_rows(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """Return a rank's rows of a tensor, a view without padding: the last ranks may have fewer than the others."""
    rows = rows_of(len(tensor), world_size)
    return tensor[rank * rows : (rank + 1) * rows]


def cut_rows(weight: Tensor, rank: int, world_size: int) -> Tensor:
    """Return a rank's rows of a weight as a new tensor, (rows, channels), with zeros beyond the last row."""
    return _padded(own_rows(weight, rank, world_size), rows_of(len(weight), world_size))


def _padded(weight: Tensor, rows: int) -> Tensor:
    padded = weight.new_zeros((rows, weight.shape[1]))
    padded[: len(weight)] = weight
    return padded


def linears_to_cut(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layers of which each rank has its rows alone: those of decoder layers, and an untied head."""
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and not _is_tied(model, head):
        modules.append(head)
    return [module for module in modules if type(module) is nn.Linear]


def _is_tied(model: Any, head: nn.Module) -> bool:
    """Whether the head's weight is the embedding's, or will be once it has been loaded."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    names = (f"{path}.weight" for path, module in model.named_modules() if module is head)
    return head.weight is getattr(model.get_input_embeddings(), "weight", None) or not tied.isdisjoint(names)


def why_not_shardable(model: PreTrainedModel) -> str | None:
    """Return why a model's weights cannot be sharded, or None.

    They cannot if decoder layers hold large weights of other layers than ``nn.Linear``; the first one is named.
    """
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and type(module) is not nn.Linear:
                    return (
                        f"weights of {type(model).__name__} cannot be sharded: {type(module).__name__} "
                        f"({name}.{kind}) in a decoder layer is not a plain linear layer."
                    )
    return None


def check_shardable(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, if a model's weights cannot be sharded."""
    why = why_not_shardable(model)
    if why is not None:
        raise ValueError(f"{why} Use shard_weights=false.")


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a model's weights.

    Attributes
    ----------
    whole : of a copy
    part : what each rank has of the layers that are cut, padding included
    replicated : what every rank has: embeddings with tied heads, norms, biases
    gathered : what a prefill has besides, for two decoder layers
    """

    whole: int
    part: int
    replicated: int
    gathered: int

    @classmethod
    def of(cls, model: PreTrainedModel, world_size: int) -> WeightSizes:
        """Measure a model whose weights are whole, with or without data, for so many ranks."""
        whole = sum(parameter.nbytes for parameter in model.parameters())
        cut = linears_to_cut(model)
        parts = {id(linear): linear.weight[0].nbytes * rows_of(linear.out_features, world_size) for linear in cut}
        layers = [sum(parts.get(id(module), 0) for module in layer.modules()) for layer in decoder_layers(model)]
        replicated = whole - sum(linear.weight.nbytes for linear in cut)
        return cls(whole, sum(parts.values()), replicated, 2 * max(layers) * world_size)


@contextmanager
def cut_while_loading(rank: int = 0, world_size: int = 1, *, absent: Set[str] = frozenset()) -> Iterator[None]:
    """Have transformers' ``from_pretrained`` read and keep this rank's rows of each weight.

    Weights that are converted on the way are read whole, one at a time, and cut at once. The layers stay ``nn.Linear``,
    to be sharded next.

    Parameters
    ----------
    absent : names of weights that this rank does not have; they are not read, and take no memory
    """
    convert, copy = core_model_loading.WeightRenaming.convert, core_model_loading._materialize_copy
    set_whole = core_model_loading.set_param_for_module
    to_cut: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
    needed: torch.Size | None = None  # while a weight is read of which rows are enough: its shape
    has_rows = False  # whether what has been read last are rows alone
    is_absent = False  # whether the weight that is read is

    def is_cut(model: Any, name: str) -> bool:
        if world_size == 1:
            return False
        if model not in to_cut:
            check_shardable(model)
            cut = {id(linear) for linear in linears_to_cut(model)}
            to_cut[model] = {f"{path}.weight" for path, module in model.named_modules() if id(module) in cut}
        return name in to_cut[model]

    def convert_rows(mapping: Any, name: str, model: Any = None, **keywords: Any) -> Any:
        nonlocal needed, is_absent
        is_absent = name in absent
        if not is_absent and is_cut(model, name) and mapping.quantization_operation is None:
            needed = model.get_parameter(name).shape
        try:
            return convert(mapping, name, model=model, **keywords)
        finally:
            needed, is_absent = None, False

    def copy_rows(tensor: Any, *arguments: Any, **keywords: Any) -> Tensor:
        nonlocal has_rows
        shape = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape  # of a slice of a file, a tensor
        has_rows = tuple(shape) == needed
        if is_absent:
            return torch.empty(1, dtype=keywords.get("dtype"), device=keywords.get("device")).expand(*shape)
        if has_rows:
            rows = rows_of(shape[0], world_size)
            tensor = tensor[rank * rows : (rank + 1) * rows]
        return copy(tensor, *arguments, **keywords)

    def set_rows(model: Any, name: str, value: Tensor, *arguments: Any, **keywords: Any) -> None:
        if name not in absent and is_cut(model, name):
            module: Any = model.get_submodule(name.removesuffix(".weight"))
            if has_rows or value.shape == module.weight.shape:  # transformers reports other shapes
                rows = rows_of(module.out_features, world_size)
                value = value.detach() if has_rows else own_rows(value.detach(), rank, world_size)
                if len(value) < rows or value.untyped_storage().nbytes() > value.nbytes:  # a view keeps all of it
                    value = _padded(value, rows)
                module.weight = nn.Parameter(module.weight[:1].expand_as(value), requires_grad=False)
        set_whole(model, name, value, *arguments, **keywords)

    with (
        mock.patch.dict(os.environ, {ONE_BY_ONE: "1"}),
        mock.patch.object(core_model_loading.WeightRenaming, "convert", convert_rows),
        mock.patch.object(core_model_loading, "_materialize_copy", copy_rows),
        mock.patch.object(core_model_loading, "set_param_for_module", set_rows),
    ):
        yield


@contextmanager
def rows_as_whole(model: PreTrainedModel, rank: int, world_size: int) -> Iterator[dict[str, int]]:
    """Have the layers that are cut look like smaller whole ones in this context: with this rank's rows, not padded.

    They may be replaced in it. After an error the model is of no use.

    Yields
    ------
    By name, how many output channels each of these layers has on all ranks together
    """
    channels = {}
    cut = {id(linear) for linear in linears_to_cut(model)} if world_size > 1 else set()
    for name, linear in model.named_modules():
        if id(linear) in cut and len(linear.weight) == rows_of(linear.out_features, world_size):
            channels[name] = linear.out_features
            mine = len(range(linear.out_features)[rank * len(linear.weight) :][: len(linear.weight)])
            linear.weight.data, linear.out_features = linear.weight.data[:mine], mine
    yield channels
    for name, number in channels.items():
        module: Any = model.get_submodule(name)
        if len(module.weight) < rows_of(number, world_size):
            module.weight.data = _padded(module.weight.data, rows_of(number, world_size))
        module.out_features = number


def make_cut(model: Any, device: torch.device, rank: int, world_size: int) -> None:
    """Give a model without data (device meta) random weights, of its linear layers only this rank's rows.

    What is drawn depends on a weight's name, and in linear layers on rank and number of ranks.
    """
    cut = set()
    if world_size > 1:
        check_shardable(model)
        cut = {id(linear) for linear in linears_to_cut(model)}
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for kind, parameter in list(module.named_parameters(recurse=False)):
            shape, seed = tuple(parameter.shape), f"{path}.{kind}"
            if id(module) in cut and kind == "weight":
                shape, seed = (rows_of(shape[0], world_size), shape[1]), f"{seed}/{rank}/{world_size}"
            if id(parameter) not in made:
                value = _random(shape, parameter.dtype, device, seed) if len(shape) > 1 else _of_norm(parameter, device)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(module, kind, made[id(parameter)])
    model.to(device)  # buffers have data already


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: str) -> Tensor:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator(device).manual_seed(number)
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=DUMMY_STD, generator=generator)


def _of_norm(parameter: Tensor, device: torch.device) -> Tensor:
    """Return ones: vectors are the weights of norms, and biases, where ones do no harm."""
    return torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
