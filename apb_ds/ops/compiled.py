"""Elementwise chains as one kernel each, through ``torch.compile``. Nothing is compiled until it is called."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether functions can be compiled for a device; tried once, and where they cannot, a warning says why."""
    numbers = torch.ones(8, device=device)
    try:
        torch.compile(_probe)(numbers)
    except (RuntimeError, ImportError, OSError) as error:  # no Triton, or no C compiler
        logger.warning("Nothing is fused, since nothing can be compiled for %s: %s", device, _first_line(error))
        return False
    return True


def _is_the_compilers(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _probe(numbers: Tensor) -> Tensor:
    return torch.sigmoid(numbers) * numbers + 1.0


@functools.cache
def compiled(function: Function) -> Function:
    """Return the function compiled; the same for the same function.

    The second length that it meets has it compiled once more, for any length. What never changes, such as heads and
    their dimension, stays a constant then, which spares the kernels divisions by numbers that they would not know.
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
                if not _is_the_compilers(error):
                    raise
                has_failed = True  # it has no code for this case, and has run nothing yet
                logger.warning("%s runs uncompiled from now on: %s", function.__qualname__, _first_line(error))
        return function(*arguments, **keywords)

    return run  # type: ignore[return-value]


def compiled_if(function: Function, is_fused: bool) -> Function:
    """Return the function compiled, or as it is."""
    return compiled(function) if is_fused else function


def compile_forwards(modules: Iterable[nn.Module]) -> None:
    """Have modules of one class compute compiled, also backwards, with inputs of any length.

    All of them share what the first one compiles: their weights are inputs of the compiled code.
    """
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMS norm in float32, (..., channels), times the weight in the dtype of `hidden`."""
    states = hidden.float()
    states = states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + eps)
    return weight * states.to(hidden.dtype)
