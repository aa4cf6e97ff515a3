"""Linear layers through oneDNN while a document is prefilled on CPU.

Torch sends float32 matrix products on CPU to its BLAS, MKL in the published builds, which holds back on processors of
other makers. oneDNN, which torch carries too, does not: same operands, same precision, no copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def onednn_linears(model: nn.Module) -> Iterator[None]:
    """Compute the model's float32 linear layers on CPU with oneDNN; on leaving, they are as they were.

    Does nothing on other devices and in other dtypes, nor where ``torch.backends.mkldnn`` is off or not built in.
    """
    linears: list[Any] = [module for module in model.modules() if _is_eligible(module)] if _is_enabled() else []
    for linear in linears:
        linear.forward = _forward_of(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _is_enabled() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def _is_eligible(module: nn.Module) -> bool:
    # Subclasses (quantized, sharded) do something else; so does whoever replaced the forward already.
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(states: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, linear.weight, linear.bias, "none", [], "")

    return forward
