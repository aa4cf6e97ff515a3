"""Elementwise chains as one kernel each, through ``torch.compile``. Nothing is compiled until it is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def compiled(function: Function) -> Function:
    """Return the function compiled for any lengths; the same for the same function."""
    return torch.compile(function, dynamic=True)  # type: ignore[return-value]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMS norm in float32, (..., channels), times the weight in the dtype of `hidden`."""
    states = hidden.float()
    states = states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + eps)
    return weight * states.to(hidden.dtype)
