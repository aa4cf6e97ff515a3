"""Collectives under way: what was started, and how to wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from apb_ds.ops import profiling
from apb_ds.parallel.failure.board import lost_ranks_named


@dataclass
class PendingGather:
    """An all-gather under way. `wait` returns ``(world_size, *shape)``, the ranks' tensors in rank order."""

    gathered: Tensor
    work: Any = None
    sent: Tensor | None = None  # kept alive until it has left

    @profiling.belongs_to(profiling.COMMUNICATION)
    def wait(self) -> Tensor:
        if self.work is not None:
            with lost_ranks_named():
                self.work.wait()
            self.work = self.sent = None
        return self.gathered


@dataclass
class PendingShift:
    """A shift under way. `wait` returns the tensor of the rank before."""

    received: Tensor
    works: list[Any] = field(default_factory=list)
    sent: Tensor | None = None  # kept alive until it has left

    @profiling.belongs_to(profiling.COMMUNICATION)
    def wait(self) -> Tensor:
        with lost_ranks_named():
            for work in self.works:
                work.wait()
        self.works, self.sent = [], None
        return self.received
