"""A streamer and a stopping criterion that tests of generation share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append(value.tolist())

    def end(self) -> None:
        self.events.append("end")


class StopAfter(StoppingCriteria):
    """Stops at `length` ids, and counts how often it was asked."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.asked += 1
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)
