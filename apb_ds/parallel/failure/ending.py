"""How a rank exits when it fails, is stopped, or another rank is lost: with a message for people and an exit code.

A rank often waits inside a collective, where Python runs no signal handlers. So a thread watches over the process: it
ends it when SIGTERM arrives, when the launcher has exited (even if that was killed and could tell nobody), and when
another rank has reported a failure.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from apb_ds.parallel.failure.board import LostRankError
from apb_ds.parallel.failure.reports import Kind
from apb_ds.parallel.launcher import launched_rank, launched_world_size

if TYPE_CHECKING:
    from apb_ds.parallel.groups import SequenceGroup

CRASH_EXIT = 1
FAILED_EXIT = 2  # bad input, or a job of a sweep that failed
LOST_EXIT = 3  # another rank was lost
INTERRUPTED_EXIT = 130  # the shells' code for SIGINT
STOPPED_EXIT = 143  # the shells' code for SIGTERM
PIPE_EXIT = 141  # the shells' code for SIGPIPE

POLL_S = 0.5
# How long the main thread may take to exit by itself, which says more and keeps records. Then the watch ends it.
MAIN_THREAD_S = 6.0
LAUNCHERS = ("deepspeed", "ds", "runner.py")
GOT_SIGTERM = "it got SIGTERM, which a launcher sends when another of its ranks has exited."

Abandon = Callable[[str], None]


class Stopped(BaseException):
    """This process was asked to exit. Not an Exception, so that nothing takes it for a failed job."""


class Watch:
    """Watches over this process, as a context manager; does nothing without a launcher.

    Whoever makes the process group calls `follow`: until then, messages say neither where this rank was nor which
    rank failed first.
    """

    def __init__(self) -> None:
        self._why = ""  # this process is to exit
        self._group: SequenceGroup | None = None
        self._cleanups: list[Callable[[], object]] = []
        self._deadline: float | None = None
        self._failed_elsewhere = False
        self._graceful: tuple[Callable[[], object], float] | None = None
        self._pipe: tuple[int, int] | None = None
        self._before: tuple[Any, int] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if launched_world_size() > 1 and threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._before = signal.signal(signal.SIGTERM, self._handle), signal.set_wakeup_fd(self._pipe[1])
            self._ancestors = _ancestors()
            self._threads = [
                threading.Thread(target=work, daemon=True, name=f"apb_ds {name}")
                for name, work in (("watch", self._look_after), ("board", self._listen))
            ]
            for thread in self._threads:
                thread.start()
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
        # One that is in C++ while the interpreter goes would abort the process.
        for thread in self._threads:
            thread.join(MAIN_THREAD_S)  # a store beyond a broken link does not answer
        for end in self._pipe:
            os.close(end)

    def follow(self, group: SequenceGroup) -> None:
        """Report this process's end to the ranks of the group, with the group's progress, and end with theirs."""
        self._group = group

    def add_cleanup(self, cleanup: Callable[[], object]) -> None:
        """Have `leave` call this: `os._exit` runs no atexit handlers."""
        self._cleanups.append(cleanup)

    @contextlib.contextmanager
    def ending_gracefully(self, stop: Callable[[], object], within_s: float) -> Iterator[None]:
        """Have the first SIGTERM or Ctrl-C call `stop`, from any thread, after which the block has some time to end.

        A second Ctrl-C ends the process as usual, and so does whatever else ends it.

        Parameters
        ----------
        within_s : seconds
        """
        self._graceful = stop, within_s
        is_main = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGINT, *([] if self._pipe else [signal.SIGTERM])] if is_main else []
        before = {number: signal.signal(number, self._stop_gracefully) for number in numbers}
        try:
            yield
        finally:
            self._graceful = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_gracefully(self, number: int, frame: FrameType | None) -> None:
        if self._graceful is not None:  # in a thread: this one may hold a lock that it takes
            threading.Thread(target=self._graceful[0], daemon=True).start()
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def give_up(self, error: BaseException, abandon: Abandon | None = None) -> NoReturn:
        """End the process after an error: tell the other ranks and the user why, and call ``abandon(why)``."""
        self._end_by_main_thread()
        if isinstance(error, Stopped):
            message, code = self._diagnose(Kind.STOPPED, str(error)), STOPPED_EXIT
        elif isinstance(error, LostRankError):
            message, code = str(error), LOST_EXIT
        elif isinstance(error, BrokenPipeError):
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (or the last flush fails again)
            message, code = self._diagnose(Kind.RAISED, "the reader of its output has exited (closed pipe)."), PIPE_EXIT
        elif _is_out_of_memory(error):
            message, code = self._diagnose(Kind.RAISED, str(error)), FAILED_EXIT
        else:
            print(f"[rank {launched_rank()}] {traceback.format_exc()}", file=sys.stderr, flush=True)
            message, code = self._diagnose(Kind.RAISED, f"{type(error).__name__}: {error}"), CRASH_EXIT
        _print_error(message)
        if abandon is not None:
            with contextlib.suppress(Exception):  # a full disk, a closed pipe: the message is out already
                abandon(message)
        self.leave(code)

    def interrupt(self, abandon: Abandon) -> NoReturn:
        """End the process after Ctrl-C, which every rank gets: call ``abandon(why)``."""
        self._end_by_main_thread()  # the launcher, which got it too, sends SIGTERM
        if launched_rank() == 0:
            print("Interrupted.", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # a full disk, a closed pipe
            abandon("interrupted by Ctrl-C.")
        self.leave(INTERRUPTED_EXIT)

    def leave(self, code: int) -> NoReturn:
        """End the process: at once if it is one of several ranks, else normally.

        After a lost connection, gloo's threads would abort a process that exits normally.
        """
        if launched_world_size() == 1:
            raise SystemExit(code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for cleanup in self._cleanups:
            cleanup()
        os._exit(code)

    def _end_by_main_thread(self) -> None:
        self._ended.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _diagnose(self, kind: Kind, why: str, *, grace_s: float | None = None) -> str:
        """Report why this process ends, and return the message it ends with."""
        board = None if self._group is None else self._group.board
        return why if board is None else board.diagnose(kind, why, grace_s=grace_s)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Run in the main thread, as soon as it is not inside C code."""
        if not self._ended.is_set() and (self._graceful is None or self._failed_elsewhere):
            raise Stopped(self._why or GOT_SIGTERM)

    def _look_after(self) -> None:
        assert self._pipe is not None
        while not self._ended.is_set():
            ready, _, _ = select.select([self._pipe[0]], [], [], POLL_S)
            if ready and signal.SIGTERM in os.read(self._pipe[0], 64):
                self._expect_end(GOT_SIGTERM, gracefully=True)
            gone = next((name for name, is_alive in self._ancestors if not is_alive()), None)
            if gone and self._deadline is None:
                self._expect_end(f"its launcher ({gone}) has exited.", gracefully=True)
                os.kill(os.getpid(), signal.SIGTERM)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end()

    def _listen(self) -> None:
        """Wait until a rank reports a failure; answer it, and make sure that this process ends too."""
        while not self._ended.wait(POLL_S):
            with contextlib.suppress(Exception):  # the store's errors: the main thread will see them too
                board = None if self._group is None else self._group.board
                if board is not None and board.has_reports():
                    self._failed_elsewhere = True
                    self._expect_end("another rank has failed.")
                    board.answer()
                    return

    def _expect_end(self, why: str, *, gracefully: bool = False) -> None:
        within_s = MAIN_THREAD_S
        if gracefully and self._graceful is not None:
            stop, within_s = self._graceful
            stop()
        if self._deadline is None or time.monotonic() + within_s < self._deadline:
            self._why = why
            self._deadline = time.monotonic() + within_s

    def _end(self) -> None:
        """End the process, since the main thread does not."""
        if self._ended.is_set():
            return
        _print_error(self._diagnose(Kind.STOPPED, self._why, grace_s=1.0))
        self.leave(STOPPED_EXIT)


def _print_error(message: str) -> None:
    """Print an error on standard error in one write, since several ranks share it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"Error: {message}\n")
        sys.stderr.flush()


def _is_out_of_memory(error: BaseException) -> bool:
    from apb_ds.ops.memory import is_out_of_memory  # imports torch

    return is_out_of_memory(error)


def _ancestors() -> list[tuple[str, Any]]:
    """Return the launcher's processes above this one, by name, each with a function that says whether it is alive."""
    parent = os.getppid()
    found: list[tuple[str, Any]] = [(f"process {parent}", lambda: os.getppid() == parent)]
    # `deepspeed` starts a launcher on each node, which does not notice when `deepspeed` itself is killed.
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
