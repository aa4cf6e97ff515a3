"""Ctrl-C during an answer stops the answer, not the program."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopRequest(StoppingCriteria):
    """A stopping criterion that a user's Ctrl-C meets. The first rank's decides for all ranks.

    Attributes
    ----------
    is_made : whether the user asked to stop
    """

    def __init__(self) -> None:
        self.is_made = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.is_made, device=input_ids.device)

    @contextlib.contextmanager
    def by_interrupt(self) -> Iterator[None]:
        """Take the first Ctrl-C for the request; the next one raises KeyboardInterrupt, as usual.

        Other handlers than Python's own stay as they are.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_made:
            raise KeyboardInterrupt
        self.is_made = True
