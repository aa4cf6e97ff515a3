"""What to say when memory runs out, on CUDA or on the host."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch

from apb_ds.plan import Plan

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


def levers(plan: Plan, dtype: torch.dtype, is_prefill: bool) -> str:
    """Return what helps where a request of such a plan runs out of memory, as `explain_out_of_memory` takes it."""
    per_round = len(plan.served(0, 0)) if is_prefill and plan.method == "apb" else 1
    fewer = f"one host a round (hosts_per_round=1 instead of {per_round}), " if per_round > 1 else ""
    return (
        f"What helps: {fewer}more hosts than {plan.hosts} (a round then holds fewer tokens of the document), more "
        f"ranks than {plan.world_size} (each holds its share of the cache), MLPs in tiles (mlp_tile=2048), a smaller "
        f"dtype than {str(dtype).removeprefix('torch.')} (model.dtype=bfloat16), or a shorter document."
    )
