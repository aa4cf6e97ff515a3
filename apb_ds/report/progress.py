"""Progress for people: a bar while a document is prefilled, a bar or now and then a line while a batch runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # where the output is no terminal

Report = Callable[[int, int], None]


@contextlib.contextmanager
def prefill_progress(console: Console, *, shown: bool = True) -> Iterator[Report | None]:
    """Yield a callback ``(done, total)`` that moves the bar, or None where no one would see it.

    Parameters
    ----------
    console : Console
        Nothing is shown unless it is a terminal: a log file has no use for a bar.
    shown : bool
        False on all ranks but the first.
    """
    if not shown or not console.is_terminal:
        yield None
        return
    with _bar(console) as progress:
        bar = progress.add_task("Prefill", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


class BatchProgress:
    """How far a batch is: lines done, document tokens per second, time left.

    The time left is that of the documents still to be prefilled, by their bytes (their tokens are not known before),
    and of the lines still to be answered.

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
        self._began = self._said = time.monotonic()
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
        """Count a line that has been answered, or could not be."""
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
            parts.append(f"{self.tokens / seconds:,.0f} tokens/s".replace(",", " "))
        left = self.time_left_s()
        if left is not None and self.lines_done < self.num_lines:
            parts.append(f"{_clock(left)} left")
        return ", ".join(parts)

    def time_left_s(self) -> float | None:
        """Return the seconds left if it goes on as before, None before there is anything to go by."""
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
        elif now - self._said >= LINE_EVERY_S or self.lines_done == self.num_lines:
            self._said = now
            self.console.print(f"{self.text()}, {_clock(now - self._began)} so far")


@contextlib.contextmanager
def batch_progress(console: Console, num_lines: int, num_bytes: int, unit: str) -> Iterator[BatchProgress]:
    """Yield the progress of a batch: a bar on a terminal, elsewhere a line every ten seconds."""
    if not console.is_terminal:
        yield BatchProgress(console, num_lines, num_bytes, None, unit)
        return
    with _bar(console, time_left=False) as progress:
        yield BatchProgress(console, num_lines, num_bytes, progress, unit)


@contextlib.contextmanager
def steps_progress(
    console: Console, num_steps: int, done: int, *, shown: bool = True
) -> Iterator[Callable[[int], None] | None]:
    """Yield a callback that takes the number of steps that are done and moves a bar, or None where no one would see it.

    Parameters
    ----------
    done : steps that are done before it begins
    shown : False on all ranks but the first
    """
    if not shown or not console.is_terminal:
        yield None
        return
    with _bar(console) as progress:
        bar = progress.add_task("Training", total=num_steps, completed=done)
        yield lambda step: progress.update(bar, completed=step)


def _bar(console: Console, *, time_left: bool = True) -> Progress:
    columns = [TextColumn("[progress.description]{task.description}"), BarColumn(), TaskProgressColumn()]
    columns.append(TimeElapsedColumn())
    if time_left:
        columns.append(TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
