"""Peak memory of this process: allocated on its CUDA device, or resident on the host."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak, so that a job does not report the peak of an earlier one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # needs Linux, and is not allowed in every container
        _CLEAR_REFS.write_text(_RESET_PEAK)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since `reset_peak_memory`, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_kind(device: torch.device) -> str:
    """Return what `peak_memory_bytes` counts on this device."""
    return "cuda allocated" if device.type == "cuda" else "resident"
