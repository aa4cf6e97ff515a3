"""The failure board: when a rank is lost, ranks exchange reports, and each says which rank failed first.

The board is the store through which the ranks met; the first rank's process serves it (under torchrun, its agent). A
rank that fails posts why and where. A rank whose collective fails posts where it was, gives the others a moment to
post theirs, and reads them: the rank that raised an error failed first, or else the rank that posted nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

from apb_ds.parallel.failure.progress import Progress
from apb_ds.parallel.failure.reports import RERUN, Kind, Report, diagnose, shortened

# How long a rank waits for the others' reports. The launcher leaves 30 s between SIGTERM and SIGKILL.
GRACE_S = 2.0
# The first rank serves the board: how long it stays for ranks that have not read it yet.
SERVER_STAYS_S = 1.5
POLL_S = 0.05
PREFIX = "apb_ds/failures"
# Gloo raises plain RuntimeErrors. Most start with a location in its source.
GLOO_MESSAGES = (
    "/gloo/",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Timed out waiting",
)

Answer = TypeVar("Answer")


class LostRankError(Exception):
    """A collective failed because another rank has exited, hangs or cannot be reached. The process cannot continue.

    Leave the process with ``os._exit``: after a lost connection, gloo's threads abort a process that exits normally.
    """


class Board:
    """The reports of all ranks, as one rank sees them.

    Parameters
    ----------
    store : torch Store that all ranks share
    rank, world_size : global
    progress : this rank's

    Attributes
    ----------
    advice : what messages say to do once the cause is mended
    """

    def __init__(self, store: Any, rank: int, world_size: int, progress: Progress) -> None:
        self.rank = rank
        self.world_size = world_size
        self.progress = progress
        self.advice = RERUN
        self._store = store
        # What `answer` has read: the first rank, and the board with it, may go before this rank's collective fails.
        self._remembered: dict[int, Report] = {}
        self._others_had_time = False

    @classmethod
    def of_world(cls, progress: Progress) -> Board | None:
        """Return a board of all ranks of the initialised ``torch.distributed``; None if there is only one."""
        from torch import distributed

        if distributed.get_world_size() == 1:
            return None
        store = distributed.PrefixStore(PREFIX, distributed.distributed_c10d._get_default_store())
        return cls(store, distributed.get_rank(), distributed.get_world_size(), progress)

    def post(self, kind: Kind, why: str = "") -> None:
        """Report this rank, unless it has reported already."""
        # Two threads may post: that the rank was alive must not hide why it failed.
        key = f"{self.rank}/busy" if kind is Kind.BUSY else str(self.rank)
        if not self._store.check([key]):
            self._store.set(key, json.dumps(asdict(self._report(kind, shortened(why)))))
            self._store.set("any", "1")

    def has_reports(self) -> bool:
        """Whether any rank has posted a report."""
        return bool(self._store.check(["any"]))

    def answer(self) -> None:
        """Report that this rank is alive, and remember what the others report."""
        self.post(Kind.BUSY)
        self._remembered = self.read()
        self._remembered = self.read_all(GRACE_S)
        self._others_had_time = True

    def read(self) -> dict[int, Report]:
        """Return the reports so far, by rank."""
        found = {}
        for rank in range(self.world_size):
            for key in (str(rank), f"{rank}/busy"):
                if self._store.check([key]):
                    values = json.loads(self._store.get(key))
                    found[rank] = Report(**{**values, "kind": Kind(values["kind"])})
                    break
        return found

    def read_all(self, grace_s: float) -> dict[int, Report]:
        """Return the reports of all ranks, or those posted within `grace_s` seconds."""
        deadline = time.monotonic() + grace_s
        while True:
            reports = self.read()
            if len(reports) == self.world_size or time.monotonic() >= deadline:
                break
            time.sleep(POLL_S)
        self._store.set(f"{self.rank}/read", "1")
        deadline = time.monotonic() + SERVER_STAYS_S
        while self.rank == 0 and time.monotonic() < deadline:
            if all(self._store.check([f"{rank}/read"]) for rank in reports):
                break
            time.sleep(POLL_S)
        return reports

    def diagnose(self, kind: Kind, why: str, *, grace_s: float | None = None) -> str:
        """Report why this rank ends, and return the message it ends with: which rank failed first, and what to do.

        Parameters
        ----------
        why : an error's text
        grace_s : how long to wait for the other ranks' reports, default `GRACE_S`
        """
        grace_s = GRACE_S if grace_s is None else grace_s

        def exchange() -> dict[int, Report]:
            self.post(kind, why)
            return self.read_all(grace_s)

        # A store beyond a broken link does not answer, and its client has no timeout.
        reports = _within(grace_s + SERVER_STAYS_S + 1, exchange)
        if reports is None and self._others_had_time:
            reports = self._remembered
        mine = self._report(kind, why)
        return diagnose(mine, self.world_size, reports, self._remembered, advice=self.advice)

    def _report(self, kind: Kind, why: str) -> Report:
        return Report(self.rank, kind, str(self.progress), why, socket.gethostname())


@contextlib.contextmanager
def lost_ranks_named(board: Board | None) -> Iterator[None]:
    """Turn the error of a collective whose peers are gone into a `LostRankError` that says which rank failed first."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        why = str(error)
        raise LostRankError(why if board is None else board.diagnose(Kind.LOST, why)) from error


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective's error means that another rank does not answer, rather than a wrong argument."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(message in str(error) for message in GLOO_MESSAGES)


def _within(seconds: float, work: Callable[[], Answer]) -> Answer | None:
    """Return the result of the work, None if it fails or takes longer."""
    answers: list[Answer] = []

    def run() -> None:
        with contextlib.suppress(Exception):  # the store's errors: its server is gone
            answers.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
