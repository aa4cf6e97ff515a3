"""Recognise out-of-memory errors, of CUDA and of the host, and say what helps."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import psutil
import torch

from apb_ds.plan import Plan

DEVICE_SHARE = 0.9
HOST_SHARE = 0.5

# torch's host allocator raises a plain RuntimeError.
HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(message in str(error) for message in HOST_MESSAGES)


def available_bytes(device: torch.device) -> int:
    """Return how many bytes can be allocated on a device, with some left for everything else."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available * HOST_SHARE)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + cached) * DEVICE_SHARE)


@contextlib.contextmanager
def explain_out_of_memory(doing: str, levers: str) -> Iterator[None]:
    """If memory runs out, raise ``torch.OutOfMemoryError`` that says during what, and what helps.

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
    """Return the `levers` of `explain_out_of_memory` for a request with this plan."""
    by_rounds = is_prefill and plan.method == "apb"  # only there do hosts matter
    per_round = len(plan.served(0, 0)) if by_rounds else 1
    fewer = f"one host per round (hosts_per_round=1 instead of {per_round}), " if per_round > 1 else ""
    if by_rounds:
        fewer += f"more hosts than {plan.hosts} (fewer tokens per round), "
    return (
        f"What helps: {fewer}more ranks than {plan.world_size} (each holds its share of the cache), MLPs in tiles "
        f"(mlp_tile=2048), a smaller dtype than {str(dtype).removeprefix('torch.')}, or a shorter "
        f"document{'' if is_prefill else ' or query'}."
    )
