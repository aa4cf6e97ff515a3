"""A progress bar while the document is prefilled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def prefill_progress(console: Console, *, shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
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
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("Prefill", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
