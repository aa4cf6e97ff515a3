"""The GPU's clock right after it has worked, which timings on it depend on."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

QUERY = ("clocks.sm", "clocks.max.sm", "power.draw", "temperature.gpu")
NAMES = ("sm_mhz", "max_sm_mhz", "power_w", "temperature_c")
TIMEOUT_S = 10


def read_clocks(device: torch.device) -> dict[str, float | None] | None:
    """Return nvidia-smi's current numbers for the device; None on other devices, or if it cannot be run."""
    if device.type != "cuda":
        return None
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # nvidia-smi numbers all GPUs, torch only those visible to this process: prefer the identity over the index.
    chosen = str(device.index or 0) if identity is None else f"GPU-{str(identity).removeprefix('GPU-')}"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "-i", chosen]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_clocks(done.stdout) if done.returncode == 0 else None


def parse_clocks(text: str) -> dict[str, float | None] | None:
    """Return the numbers of one line of nvidia-smi by `NAMES`, with None for those it does not know."""
    fields = [field.strip() for field in text.strip().splitlines()[0].split(",")] if text.strip() else []
    if len(fields) != len(NAMES):
        return None
    return {name: _number(field) for name, field in zip(NAMES, fields, strict=True)}


def summarise_clocks(readings: list[dict[str, float | None] | None]) -> dict[str, Any] | None:
    """Return the smallest and largest of each number over the runs; None if nothing was read."""
    known = [reading for reading in readings if reading is not None]
    if not known:
        return None
    summary: dict[str, Any] = {}
    for name in NAMES:
        numbers = [number for reading in known if (number := reading[name]) is not None]
        summary[name] = {"min": min(numbers), "max": max(numbers)} if numbers else None
    return summary


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:  # "[N/A]"
        return None
