"""How a rank ends when something goes wrong: in time, with a message that has its number, and not alone.

A thread looks after each rank that a launcher started. It works also while the main thread waits inside a collective,
where Python handles no signal. It ends the rank when a signal asks for it, when the launcher has ended (also where that
was killed and could tell nobody), and when another rank has written down that it fails.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

CRASH_EXIT = 1
FAILED_EXIT = 2  # bad input, or a job of a sweep that failed
LOST_EXIT = 3  # another rank was lost
INTERRUPTED_EXIT = 130  # as shells have it for SIGINT
STOPPED_EXIT = 143  # as shells have it for SIGTERM
PIPE_EXIT = 141  # as shells have it for SIGPIPE

POLL_S = 0.5
# How long the main thread may take to end by itself: it says more, and keeps records. Then the process is ended.
MAIN_THREAD_S = 6.0
LAUNCHERS = ("deepspeed", "ds", "runner.py")


Abandon = Callable[[str], None]

at_leaving: list[Callable[[], object]] = []  # `os._exit` runs nothing that atexit knows


class Stopped(BaseException):
    """This process was asked to end. Not an Exception: nobody mistakes it for a job's failure."""


def rank() -> int:
    """Return the global rank that the launcher gave this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def under_launcher() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def leave(code: int) -> NoReturn:
    """End the process at once where there are several ranks, else as usual.

    After a link was lost, gloo's threads would abort a process that ends as usual.
    """
    if not under_launcher():
        raise SystemExit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for cleanup in at_leaving:
        cleanup()
    os._exit(code)


def say(message: str) -> None:
    """Print an error on standard error, in one piece: several ranks share it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"Error: {message}\n")
        sys.stderr.flush()


class Watch:
    """Looks after this process, as a context manager; does nothing without a launcher."""

    def __init__(self) -> None:
        self.why = ""  # what the main thread is asked to end for
        self._deadline: float | None = None
        self._pipe: tuple[int, int] | None = None
        self._before: tuple[Any, int] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if under_launcher() and threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._before = signal.signal(signal.SIGTERM, self._handle), signal.set_wakeup_fd(self._pipe[1])
            self._ancestors = _ancestors()
            self._thread = threading.Thread(target=self._look_after, daemon=True, name="apb_ds watch")
            self._thread.start()
            threading.Thread(target=self._listen, daemon=True, name="apb_ds board").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._before is None or self._pipe is None:
            return
        signal.set_wakeup_fd(self._before[1])
        signal.signal(signal.SIGTERM, self._before[0])
        os.write(self._pipe[1], b"\0")  # wakes the thread
        self._thread.join()
        for end in self._pipe:
            os.close(end)

    def close(self) -> None:
        """Look after nothing from now on: the main thread is ending the process already."""
        self._ended.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, as soon as that is not inside of C code."""
        if not self._ended.is_set():
            raise Stopped(self.why or "it got SIGTERM, which a launcher sends when another of its ranks has ended.")

    def _look_after(self) -> None:
        assert self._pipe is not None
        while not self._ended.is_set():
            ready, _, _ = select.select([self._pipe[0]], [], [], POLL_S)
            if ready and signal.SIGTERM in os.read(self._pipe[0], 64):
                self._expect_end("it got SIGTERM, which a launcher sends when another of its ranks has ended.")
            gone = next((name for name, is_there in self._ancestors if not is_there()), None)
            if gone and self._deadline is None:
                self._expect_end(f"its launcher ({gone}) has ended.")
                os.kill(os.getpid(), signal.SIGTERM)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end()

    def _listen(self) -> None:
        """Wait until some rank has written down that it fails; answer, and see that this one ends too."""
        from apb_ds.parallel.failure.board import Board

        while not self._ended.wait(POLL_S):
            with contextlib.suppress(Exception):  # the store's own errors: the main thread will see them too
                board = Board.of_world()
                if board is not None and board.has_reports():
                    self._expect_end("another rank has failed.")
                    board.answer()
                    return

    def _expect_end(self, why: str) -> None:
        if self._deadline is None:
            self.why = why
            self._deadline = time.monotonic() + MAIN_THREAD_S

    def _end(self) -> None:
        """End the process in place of a main thread that does not get to it."""
        from apb_ds.parallel.failure.board import Kind, tell_and_diagnose

        if self._ended.is_set():
            return
        say(tell_and_diagnose(Kind.STOPPED, self.why, grace_s=1.0))
        leave(STOPPED_EXIT)


class GivingUp:
    """What this rank does when it cannot go on."""

    def __init__(self, watch: Watch, abandon: Abandon | None) -> None:
        self._watch = watch
        self._abandon = abandon

    def on(self, error: BaseException) -> NoReturn:
        """Tell the other ranks and people why, keep what can be kept, and end the process."""
        self._watch.close()
        from apb_ds.parallel.failure.board import Kind, LostRankError, tell_and_diagnose

        if isinstance(error, Stopped):
            message, code = tell_and_diagnose(Kind.STOPPED, str(error)), STOPPED_EXIT
        elif isinstance(error, LostRankError):
            message, code = str(error), LOST_EXIT
        elif isinstance(error, BrokenPipeError):
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (or the last flush fails again)
            message = tell_and_diagnose(Kind.RAISED, "who read its output has ended (a closed pipe).")
            code = PIPE_EXIT
        elif _is_out_of_memory(error):
            message, code = tell_and_diagnose(Kind.RAISED, str(error)), FAILED_EXIT
        else:
            print(f"[rank {rank()}] {traceback.format_exc()}", file=sys.stderr, flush=True)
            message = tell_and_diagnose(Kind.RAISED, f"{type(error).__name__}: {error}")
            code = CRASH_EXIT
        say(message)
        if self._abandon is not None:
            with contextlib.suppress(Exception):  # a full disk, a closed pipe: the reason is told already
                self._abandon(message)
        leave(code)


def _is_out_of_memory(error: BaseException) -> bool:
    from apb_ds.ops.memory import is_out_of_memory  # brings torch along

    return is_out_of_memory(error)


def _ancestors() -> list[tuple[str, Any]]:
    """Return the launcher's processes above this one, each with a function that says whether it is still there."""
    parent = os.getppid()
    found: list[tuple[str, Any]] = [(f"process {parent}", lambda: os.getppid() == parent)]
    # `deepspeed` starts a launcher of its own on each node, which does not notice when `deepspeed` itself is killed.
    above = _parent_of(parent)
    command = _command_of(above) if above is not None else []
    if any(Path(word).name in LAUNCHERS for word in command[:3]):
        found.append((f"deepspeed, process {above}", lambda: _parent_of(parent) in (above, None)))
    return found


def _parent_of(process: int) -> int | None:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])


def _command_of(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []
