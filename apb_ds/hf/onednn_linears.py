"""Run linear layers with oneDNN while a document is prefilled on CPU.

Torch sends float32 matrix products on CPU to its BLAS. That is MKL in the published builds, and MKL is slow on
non-Intel CPUs. oneDNN, which torch also ships, is not, with the same operands and precision. Weights are reordered for
it once per prefill if that takes little memory, else by each product.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apb_ds.hf.overrides import forward_replacement, has_other_forward, overridden

# Memory that reordered copies of the weights may take during a prefill.
MAX_REORDERED_BYTES = 2**30

# oneDNN compiles a primitive for each shape that it meets, about 0.5 MiB, and keeps the last 1024; torch keeps as many
# again. A request has some 20 shapes: three or four sizes of layers, times the lengths of forwards and tiles of MLPs.
# 128 keep those of several requests, in about 0.1 GiB a process instead of 0.6 after 200 lengths, and growing.
CACHED_PRIMITIVES = 128
CACHE_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_primitive_caches() -> None:
    """Limit what oneDNN and torch keep for shapes they have met, unless the environment already says how much.

    Both read the environment at this process's first product with oneDNN, so call it before that.
    """
    for name in CACHE_CAPACITIES:
        os.environ.setdefault(name, str(CACHED_PRIMITIVES))


@contextmanager
def onednn_linears(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Compute the model's float32 linear layers on CPU with oneDNN, in this context; restore them on leaving.

    Other devices and dtypes are left alone, as is everything where ``torch.backends.mkldnn`` is off or missing.

    Parameters
    ----------
    num_tokens : int
        About how many rows a product will have; oneDNN orders the weights accordingly.
    """
    is_possible = _is_enabled() and next(model.parameters()).device.type == "cpu"
    linears: list[Any] = [module for module in model.modules() if _is_eligible(module)] if is_possible else []
    reorder = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears) <= MAX_REORDERED_BYTES
    overrides = []
    for linear in linears:
        weight = linear.weight.detach()
        if reorder:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)
        forward = _forward_of(linear, weight)
        overrides.append(forward_replacement(linear, forward))
    with overridden(overrides):
        yield


def _is_enabled() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def _is_eligible(module: nn.Module) -> bool:
    # Subclasses (quantised, sharded), of the weights too, compute something else, as may a forward that was replaced.
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not has_other_forward(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _forward_of(linear: nn.Linear, weight: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(states: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, weight, linear.bias, "none", [], "")

    return forward
