"""When a rank is lost: what each rank knows goes to a board that all can read, and each says who failed first.

The board is the store through which the ranks met; the first rank's process (under torchrun, its agent) serves it. A
rank that fails writes down why and where. A rank whose collective fails writes down where it was, gives the others a
moment to do the same, and reads: who has an error of its own failed first, and so did who wrote nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from apb_ds.parallel.failure import place
from apb_ds.parallel.failure.reports import Kind, Report, diagnose, shortened

# How long the others have to write down what they know. The launcher leaves more: 30 s between SIGTERM and SIGKILL.
GRACE_S = 2.0
# The first rank serves the board: so long it stays for others who have not read it yet.
SERVER_STAYS_S = 1.5
POLL_S = 0.05
PREFIX = "apb_ds/failures"
# Gloo's errors are plain RuntimeErrors. Most start with the place in its source.
GLOO_SAYS = ("/gloo/", "Application timeout caused pair closure", "Connection closed by peer", "Timed out waiting")

Answer = TypeVar("Answer")


class LostRankError(Exception):
    """A collective failed because another rank has ended, hangs or cannot be reached. The process cannot go on.

    Leave the process with ``os._exit``: gloo's threads abort one that ends the usual way after a link was lost.
    """


class Board:
    """The reports of all ranks.

    Parameters
    ----------
    store : torch Store that all ranks share
    rank, world_size : global
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store

    @classmethod
    def of_world(cls) -> Board | None:
        """Return the board of all ranks; None before they have met, or for a rank alone."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        distributed = torch.distributed
        if distributed.get_world_size() == 1:
            return None
        store = distributed.PrefixStore(PREFIX, distributed.distributed_c10d._get_default_store())
        return cls(store, distributed.get_rank(), distributed.get_world_size())

    def post(self, kind: Kind, why: str = "") -> None:
        """Write down what this rank knows, unless it has done so before."""
        mine = Report(self.rank, kind, str(place.here()), shortened(why), socket.gethostname())
        # Two threads of a rank may write; that it was alive is the lesser news.
        key = f"{self.rank}/busy" if kind is Kind.BUSY else str(self.rank)
        if not self._store.check([key]):
            self._store.set(key, json.dumps(asdict(mine)))
            self._store.set("any", "1")

    def has_reports(self) -> bool:
        """Whether any rank has written something down."""
        return bool(self._store.check(["any"]))

    def answer(self) -> None:
        """Write down that this rank is alive, and remember what the others have written.

        The first rank may end, and the board with it, before this rank's own collective fails.
        """
        self.post(Kind.BUSY)
        _memory.reports = self.read()
        _memory.reports = self.read_all(GRACE_S)
        _memory.is_settled = True

    def read(self) -> dict[int, Report]:
        """Return what is there, by rank."""
        found = {}
        for rank in range(self.world_size):
            for key in (str(rank), f"{rank}/busy"):
                if self._store.check([key]):
                    values = json.loads(self._store.get(key))
                    found[rank] = Report(**{**values, "kind": Kind(values["kind"])})
                    break
        return found

    def read_all(self, grace_s: float) -> dict[int, Report]:
        """Return the reports of all ranks, or of those that have written one when the time is over."""
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


@dataclass
class _Memory:
    """What `Board.answer` has read; settled once the others had the time to write."""

    reports: dict[int, Report] = field(default_factory=dict)
    is_settled: bool = False


_memory = _Memory()


def tell_and_diagnose(kind: Kind, why: str, *, grace_s: float | None = None) -> str:
    """Write down why this rank ends, and return what is known of who failed first, for people.

    Parameters
    ----------
    why : an error's text
    grace_s : how long to wait for the other ranks' reports, default `GRACE_S`
    """
    grace_s = GRACE_S if grace_s is None else grace_s
    board = Board.of_world()
    if board is None:
        return why

    def tell() -> dict[int, Report]:
        board.post(kind, why)
        return board.read_all(grace_s)

    # A store on the other side of a broken link does not answer, and its client has no timeout.
    reports = _within(grace_s + SERVER_STAYS_S + 1, tell)
    if reports is None and _memory.is_settled:
        reports = _memory.reports
    return diagnose(board.rank, board.world_size, reports, kind, why, remembered=_memory.reports)


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turn the error of a collective whose peers are gone into a `LostRankError` that says which rank failed first."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise LostRankError(tell_and_diagnose(Kind.LOST, str(error))) from error


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of a collective means that another rank does not answer, rather than a wrong argument."""
    import torch

    said = str(error)
    return isinstance(error, torch.distributed.DistError) or any(part in said for part in GLOO_SAYS)


def _within(seconds: float, work: Callable[[], Answer]) -> Answer | None:
    """Return what the work gives, None if it fails or takes longer."""
    answers: list[Answer] = []

    def run() -> None:
        with contextlib.suppress(Exception):  # the store's own errors: its server is gone
            answers.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
