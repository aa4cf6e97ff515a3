"""Collectives in flight: started, to be waited for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from apb_ds.ops import profiling
from apb_ds.parallel.failure.board import Board, lost_ranks_named


@dataclass
class PendingGather:
    """An all-gather in flight. `wait` returns ``(world_size, *shape)``, the ranks' tensors in rank order."""

    gathered: Tensor
    work: Any = None
    sent: Tensor | None = None  # kept alive until it is sent
    board: Board | None = None  # where failures are reported

    @profiling.belongs_to(profiling.COMMUNICATION)
    def wait(self) -> Tensor:
        if self.work is not None:
            with lost_ranks_named(self.board):
                self.work.wait()
            self.work = self.sent = None
        return self.gathered


@dataclass
class PendingShift:
    """A shift in flight. `wait` returns the previous rank's tensor."""

    received: Tensor
    works: list[Any] = field(default_factory=list)
    sent: Tensor | None = None  # kept alive until it is sent
    board: Board | None = None  # where failures are reported

    @profiling.belongs_to(profiling.COMMUNICATION)
    def wait(self) -> Tensor:
        with lost_ranks_named(self.board):
            for work in self.works:
                work.wait()
        self.works, self.sent = [], None
        return self.received
