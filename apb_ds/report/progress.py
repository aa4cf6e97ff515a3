"""Progress for people: a bar while a document is prefilled, a bar or an occasional line while a batch runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from apb_ds.report.formats import format_count

LINE_EVERY_S = 10.0  # where the output is not a terminal

Report = Callable[[int, int], None]


@contextlib.contextmanager
def _progress(console: Console, name: str, *, shown: bool, done: int = 0) -> Iterator[Report | None]:
    """Yield a callback ``(done, total)`` that moves a bar, or None unless the console is a terminal."""
    if not shown or not console.is_terminal:
        yield None
        return
    with _bar(console) as progress:
        bar = progress.add_task(name, total=None, completed=done)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def prefill_progress(console: Console, *, shown: bool = True) -> AbstractContextManager[Report | None]:
    """Yield a callback ``(done, total)`` that moves a bar, or None if nobody would see it.

    Parameters
    ----------
    shown : False on all ranks but the first
    """
    return _progress(console, "Prefill", shown=shown)


@contextlib.contextmanager
def steps_progress(
    console: Console, num_steps: int, done: int, *, shown: bool = True
) -> Iterator[Callable[[int], None] | None]:
    """Yield a callback that takes the number of finished steps and moves a bar, or None if nobody would see it.

    Parameters
    ----------
    done : steps finished before
    shown : False on all ranks but the first
    """
    with _progress(console, "Training", shown=shown, done=done) as report:
        if report is not None:
            report(done, num_steps)
        yield None if report is None else lambda step: report(step, num_steps)


class BatchProgress:
    """How far a batch is: lines done, document tokens per second, time left.

    The time left covers the documents still to be prefilled, by their bytes (their tokens are not known before), and
    the lines still to be answered.

    Parameters
    ----------
    console : where it is shown
    num_lines : lines to be answered
    num_bytes : of all documents to be prefilled
    progress : the bar, or None to print lines instead
    unit : what the lines are called
    """

    def __init__(
        self, console: Console, num_lines: int, num_bytes: int, progress: Progress | None, unit: str = "lines"
    ) -> None:
        self.console = console
        self.unit = unit
        self.num_lines = num_lines
        self.num_bytes = num_bytes
        self.lines_done = 0
        self.lines_failed = 0
        self.tokens = 0
        self._bytes_before = 0
        self._bytes_now = 0.0
        self._prefill_s = 0.0
        self._prefill_began: float | None = None
        self._began = self._printed_at = time.monotonic()
        self._progress = progress
        self._bar: Any = None if progress is None else progress.add_task(self.text(), total=1.0)

    def prefill(self, document_bytes: int) -> Report:
        """Return a callback ``(done, total)`` for the prefill of the next document, which begins now."""
        self._prefill_began = time.monotonic()

        def report(done: int, total: int) -> None:
            self._bytes_now = document_bytes * done / max(total, 1)
            self._show()

        return report

    def prefilled(self, num_tokens: int, document_bytes: int) -> None:
        """Count a document that has been prefilled."""
        self._prefill_s = self._prefill_so_far()
        self._prefill_began = None
        self.tokens += num_tokens
        self._bytes_before += document_bytes
        self._bytes_now = 0.0
        self._show()

    def line_done(self, *, failed: bool) -> None:
        """Count a line that was answered, or that failed."""
        self.lines_done += 1
        self.lines_failed += int(failed)
        self._show()

    def text(self) -> str:
        """Return the progress in words."""
        seconds = time.monotonic() - self._began
        parts = [f"{self.lines_done}/{self.num_lines} {self.unit}"]
        if self.lines_failed:
            parts.append(f"{self.lines_failed} failed")
        if self.tokens and seconds > 0:
            parts.append(f"{format_count(self.tokens / seconds)} tokens/s")
        left = self.time_left_s()
        if left is not None and self.lines_done < self.num_lines:
            parts.append(f"{_clock(left)} left")
        return ", ".join(parts)

    def time_left_s(self) -> float | None:
        """Return the seconds left at the pace so far; None before anything is prefilled."""
        done = self._bytes_before + self._bytes_now
        if not done:
            return None
        prefill_s = self._prefill_so_far()
        left = max(self.num_bytes - done, 0) * prefill_s / done
        if self.lines_done:
            answers_s = time.monotonic() - self._began - prefill_s
            left += (self.num_lines - self.lines_done) * answers_s / self.lines_done
        return left

    def _prefill_so_far(self) -> float:
        now = 0.0 if self._prefill_began is None else time.monotonic() - self._prefill_began
        return self._prefill_s + now

    def _show(self) -> None:
        now = time.monotonic()
        if self._progress is not None:
            left = self.time_left_s()
            share = 0.0 if left is None else (now - self._began) / max(now - self._began + left, 1e-9)
            self._progress.update(self._bar, completed=share, description=self.text())
        elif now - self._printed_at >= LINE_EVERY_S or self.lines_done == self.num_lines:
            self._printed_at = now
            self.console.print(f"{self.text()}, {_clock(now - self._began)} so far")


@contextlib.contextmanager
def batch_progress(console: Console, num_lines: int, num_bytes: int, unit: str) -> Iterator[BatchProgress]:
    """Yield the progress of a batch: a bar on a terminal, elsewhere a line every `LINE_EVERY_S` seconds."""
    bar = _bar(console, time_left=False) if console.is_terminal else contextlib.nullcontext()
    with bar as progress:
        yield BatchProgress(console, num_lines, num_bytes, progress, unit)


def _bar(console: Console, *, time_left: bool = True) -> Progress:
    columns = [TextColumn("[progress.description]{task.description}"), BarColumn(), TaskProgressColumn()]
    columns.append(TimeElapsedColumn())
    if time_left:
        columns.append(TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
