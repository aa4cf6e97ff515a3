"""Named parts of a forward for a profiler, to see where the time goes. Off and free except within `recorded`.

A part is a ``torch.profiler.record_function`` range. Ranges nest; an operation belongs to the innermost one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

PREFIX = "apb_ds."

QKV = "qkv"
COMPRESSOR = "compressor"
COMMUNICATION = "communication"
ATTENTION = "attention"
O_PROJECTION = "o_projection"
FFN = "ffn"
OTHER = "other"
PARTS = (QKV, COMPRESSOR, COMMUNICATION, ATTENTION, O_PROJECTION, FFN, OTHER)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_RECORDED: ContextVar[bool] = ContextVar("apb_ds_ranges_recorded", default=False)
_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def recorded() -> Iterator[None]:
    """Record the parts that this thread runs as ranges of the active profiler."""
    token = _RECORDED.set(True)
    try:
        yield
    finally:
        _RECORDED.reset(token)


def are_recorded() -> bool:
    """Whether this code runs within `recorded`."""
    return _RECORDED.get()


def part(name: str) -> AbstractContextManager[object]:
    """Return a context that marks what runs in it as one of `PARTS`; it does nothing while ranges are off."""
    return torch.profiler.record_function(PREFIX + name) if _RECORDED.get() else _NOTHING


def belongs_to(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function so that its work counts as one of `PARTS`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def within(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not _RECORDED.get():
                return function(*args, **kwargs)
            with part(name):
                return function(*args, **kwargs)

        return within

    return decorate
