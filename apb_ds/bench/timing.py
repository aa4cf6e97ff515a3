"""Time on the device that does the work, and what many timings say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Stopwatch:
    """Marks between which time is taken: CUDA events on CUDA, the process's clock elsewhere.

    Nothing waits for the device but the making of the watch and `laps`.
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
        """Return the seconds of each lap; waits for the device."""
        self._synchronize()
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1000 for before, after in pairs]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class Spread:
    """What many timings say; all in the unit of the runs.

    Attributes
    ----------
    first_quartile, third_quartile : between them is the middle half of the runs
    """

    runs: tuple[float, ...]
    median: float
    minimum: float
    maximum: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """Summarise one run or more."""
        quartiles = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else [runs[0]] * 3
        return cls(tuple(runs), statistics.median(runs), min(runs), max(runs), quartiles[0], quartiles[2])

    def as_dict(self, unit: str) -> dict[str, Any]:
        """Return it as JSON has it; `unit` ends each name, such as ``s``."""
        return {
            f"runs_{unit}": list(self.runs),
            f"median_{unit}": self.median,
            f"min_{unit}": self.minimum,
            f"max_{unit}": self.maximum,
            f"quartiles_{unit}": [self.first_quartile, self.third_quartile],
        }
