"""Steps inside something long, such as a prefill: after how many of its parts the next one comes."""

from __future__ import annotations

import time

import torch

from apb_ds.parallel.groups import SequenceGroup


class Pace:
    """Says when a step is due; the first rank decides, so that all ranks step at the same place.

    Parameters
    ----------
    device : where the group's tensors must be
    every_s : seconds between two steps, about, which these come on top of
    """

    def __init__(self, group: SequenceGroup, device: torch.device, every_s: float) -> None:
        self._group = group
        self._device = device
        self._every_s = every_s
        self.begin()

    def begin(self) -> None:
        """Begin something long; the first step comes after its first part."""
        self._left = 1
        self._done, self._began, self._seconds = 0, time.perf_counter(), 0.0

    def count(self) -> bool:
        """Count a part; return whether a step is due."""
        self._done += 1
        self._left -= 1
        return self._left <= 0

    def pause(self, now: float) -> None:
        """Stop the clock before a step; `now` is when the device has done all parts so far."""
        self._seconds = now - self._began

    def go_on(self) -> None:
        """Agree on after how many parts the next step comes. All ranks call this together, after the step."""
        left = torch.tensor(max(1, int(self._every_s * self._done / max(self._seconds, 1e-6))))
        if self._group.world_size > 1:
            left = self._group.broadcast(left.to(self._device))
        self._left = int(left)
        self._done, self._began = 0, time.perf_counter()
