"""Which linear layers of a model are cut, and cutting them one by one while they are loaded or made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def cut_rows(weight: Tensor, rank: int, world_size: int) -> Tensor:
    """Return a rank's rows of a weight as a new tensor, (rows, channels), with zeros beyond the last row."""
    rows = rows_of(weight.shape[0], world_size)
    mine = weight[rank * rows : (rank + 1) * rows]
    cut = mine.new_zeros((rows, weight.shape[1]))
    cut[: len(mine)] = mine
    return cut


def linears_in_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layers of the model's decoder layers that can be cut."""
    modules = (module for layer in decoder_layers(model) for module in layer.modules())
    return [module for module in modules if type(module) is nn.Linear]


def check_shardable(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the first, if decoder layers hold large weights of other layers than ``nn.Linear``."""
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and type(module) is not nn.Linear:
                    raise ValueError(
                        f"weights of {type(model).__name__} cannot be sharded: {type(module).__name__} "
                        f"({name}.{kind}) in a decoder layer is not a plain linear layer. Use shard_weights=false."
                    )


@contextmanager
def cut_while_loading(rank: int, world_size: int) -> Iterator[None]:
    """Have transformers' ``from_pretrained`` keep this rank's rows of each weight as soon as it has been read.

    At no time is more than one of these weights whole. The layers stay ``nn.Linear``, to be sharded next.
    """
    set_whole = core_model_loading.set_param_for_module
    to_cut: dict[int, set[int]] = {}  # by the id of a model, of which there may be parts

    def set_and_cut(model: Any, target_name: str, *arguments: Any, **keywords: Any) -> None:
        set_whole(model, target_name, *arguments, **keywords)
        path, _, kind = target_name.rpartition(".")
        if id(model) not in to_cut:
            check_shardable(model)
            head = model.get_output_embeddings()
            to_cut[id(model)] = {id(linear) for linear in [*linears_in_layers(model), head]}
        module: Any = model.get_submodule(path)
        if kind == "weight" and id(module) in to_cut[id(model)] and not module.weight.is_meta:
            weight = nn.Parameter(cut_rows(module.weight.detach(), rank, world_size), requires_grad=False)
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
            module.weight = weight

    with (
        mock.patch.dict(os.environ, {ONE_BY_ONE: "1"}),
        mock.patch.object(core_model_loading, "set_param_for_module", set_and_cut),
    ):
        yield


def make_cut(model: Any, device: torch.device, rank: int, world_size: int) -> None:
    """Give a model without data (device meta) random weights, of its linear layers only this rank's rows.

    What is drawn depends on a weight's name, and in linear layers on rank and number of ranks.
    """
    check_shardable(model)
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is getattr(model.get_input_embeddings(), "weight", None)
    cut = {id(linear) for linear in linears_in_layers(model)} | (set() if is_tied else {id(head)})
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
