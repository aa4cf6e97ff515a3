"""What to say when memory runs out, on CUDA or on the host."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch

# What torch's allocator for the host says, in a plain RuntimeError.
HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that there was not enough memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(message in str(error) for message in HOST_MESSAGES)


@contextlib.contextmanager
def explain_out_of_memory(doing: str, levers: str) -> Iterator[None]:
    """Raise ``torch.OutOfMemoryError`` with what was being done and what helps, where memory runs out.

    Parameters
    ----------
    doing : such as "prefilling 1000 tokens"
    levers : sentences that say what to change
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise torch.OutOfMemoryError(f"out of memory while {doing}. {levers} ({lines[0].strip()})") from error
