"""Time on the device that does the work, and a summary of repeated timings."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch


class Stopwatch:
    """Times laps between marks: with CUDA events on CUDA, with the process's clock elsewhere.

    Only creating the watch and `laps` wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self._synchronize()
        self.mark()

    def mark(self) -> None:
        """End a lap and begin the next."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def laps(self) -> list[float]:
        """Return the seconds of each lap."""
        self._synchronize()
        pairs = itertools.pairwise(self._marks)
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1000 for before, after in pairs]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def spread(runs: Sequence[float], unit: str) -> dict[str, Any]:
    """Summarise one timing or more as a record has them: all runs, their median, extremes, and quartiles.

    Parameters
    ----------
    unit : ends each name, such as ``s``
    """
    first, _, third = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else [runs[0]] * 3
    return {
        f"runs_{unit}": list(runs),
        f"median_{unit}": statistics.median(runs),
        f"min_{unit}": min(runs),
        f"max_{unit}": max(runs),
        f"quartiles_{unit}": [first, third],
    }
