"""Elementwise chains fused into one kernel each by ``torch.compile``. A function is compiled at its first call."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from apb_ds.utils.text import first_line

Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether functions can be compiled for a device. Tries it once; if that fails, a warning says why."""
    numbers = torch.ones(8, device=device)
    try:
        torch.compile(_probe)(numbers)
    except (RuntimeError, ImportError, OSError) as error:  # no Triton, or no C compiler
        logger.warning("Nothing is fused: torch.compile does not work for %s (%s).", device, first_line(error))
        return False
    return True


def _is_compiler_error(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _probe(numbers: Tensor) -> Tensor:
    return torch.sigmoid(numbers) * numbers + 1.0


@functools.cache
def compiled(function: Function) -> Function:
    """Return the compiled function, the same object for the same function.

    The second length it meets makes it compile again, for any length. Sizes that never change, such as the number of
    heads and their dimension, stay constants, so kernels need no divisions by run-time values.
    """
    faster = torch.compile(function)
    has_failed = False

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        nonlocal has_failed
        if not has_failed:
            try:
                return faster(*arguments, **keywords)
            except RuntimeError as error:
                if not _is_compiler_error(error):
                    raise
                has_failed = True  # the compiler failed, so nothing has run yet
                logger.warning("%s runs uncompiled from now on: %s", function.__qualname__, first_line(error))
        return function(*arguments, **keywords)

    return run  # type: ignore[return-value]


def compiled_if(function: Function, is_fused: bool) -> Function:
    """Return the function, compiled if `is_fused`."""
    return compiled(function) if is_fused else function


def compile_forwards(modules: Iterable[nn.Module]) -> None:
    """Compile the forwards of modules of one class, backward passes included, for inputs of any length.

    They share the code that the first one compiles: weights are inputs of the compiled code.
    """
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMS norm in float32, (..., channels), times the weight in the dtype of `hidden`."""
    states = hidden.float()
    states = states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + eps)
    return weight * states.to(hidden.dtype)


def rms_norm_around_one(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMS norm in float32, (..., channels), times one plus the weight, also in float32, as Gemma's."""
    states = hidden.float()
    states = states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + eps)
    return (states * (1.0 + weight.float())).to(hidden.dtype)
