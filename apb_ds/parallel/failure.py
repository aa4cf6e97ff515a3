"""When a rank is lost: what each rank knows goes to a board that all can read, and each says who failed first.

The board is the store through which the ranks met; the first rank's process (under torchrun, its agent) serves it. A
rank that fails writes down why and where. A rank whose collective fails writes down where it was, gives the others a
moment to do the same, and reads: who has an error of its own failed first, and so did who wrote nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from apb_ds.parallel import place

# How long the others have to write down what they know. The launcher leaves more: 30 s between SIGTERM and SIGKILL.
GRACE_S = 2.0
# The first rank serves the board: so long it stays for others who have not read it yet.
SERVER_STAYS_S = 1.5
POLL_S = 0.05
PREFIX = "apb_ds/failures"
# Gloo's errors are plain RuntimeErrors. Most start with the place in its source.
GLOO_SAYS = ("/gloo/", "Application timeout caused pair closure", "Connection closed by peer", "Timed out waiting")
SHOWN_CHARACTERS = 600

Answer = TypeVar("Answer")


class LostRankError(Exception):
    """A collective failed because another rank has ended, hangs or cannot be reached. The process cannot go on.

    Leave the process with ``os._exit``: gloo's threads abort one that ends the usual way after a link was lost.
    """


class Kind(StrEnum):
    """What a rank says of itself."""

    RAISED = "raised"  # an error of its own
    STOPPED = "stopped"  # a signal, or its launcher has ended
    LOST = "lost"  # a collective failed
    BUSY = "busy"  # alive when another rank told of its end


@dataclass(frozen=True)
class Report:
    """What one rank has written down.

    Attributes
    ----------
    where : its place, as text
    why : the error, one line
    node : the name of its host
    """

    rank: int
    kind: Kind
    where: str
    why: str = ""
    node: str = ""


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
        mine = Report(self.rank, kind, str(place.here()), _shortened(why), socket.gethostname())
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


def diagnose(
    rank: int,
    world_size: int,
    reports: dict[int, Report] | None,
    kind: Kind,
    why: str,
    *,
    remembered: dict[int, Report] | None = None,
) -> str:
    """Return what rank `rank` has to say at its end.

    Parameters
    ----------
    reports : of all ranks that wrote one; None if the board cannot be read
    kind, why : what this rank says of itself
    remembered : reports that were read before, perhaps not all there would have been
    """
    where = place.here()
    if kind is Kind.RAISED:
        return f"rank {rank} failed in {where}: {why}"
    others = [report for report in (reports or remembered or {}).values() if report.rank != rank]
    cause = _told_failure(others)
    if not cause and reports is not None:
        cause = _silent_ranks([other for other in range(world_size) if other not in reports and other != rank])
    cause = cause or _late_ranks(others, kind)
    if not cause and reports is None and rank > 0:
        cause = (
            f"Rank 0 (on {os.environ.get('MASTER_ADDR', 'its node')}) failed first or cannot be reached: it was killed "
            "(memory that ran out? dmesg on that node tells), or its node or the link to it is down. Its own message, "
            f"if there is one, says more. {_what_to_do()}"
        )
    if kind is Kind.STOPPED:
        return " ".join(part for part in (f"rank {rank} was stopped in {where}: {why}", cause) if part)
    cause = cause or f"No rank tells of an error: one of them hung, or a link was down for a time. {_what_to_do()}"
    return f"rank {rank} cannot go on in {where}. {cause} ({_shortened(why)})"


def _told_failure(others: list[Report]) -> str:
    """Return who has an error of its own, or was stopped; empty if nobody."""
    for report in others:
        if report.kind is Kind.RAISED:
            why = report.why if report.why.endswith((".", ")")) else f"{report.why}."
            return f"Rank {report.rank} (on {report.node}) failed first, in {report.where}: {why} Mend that; {_again()}"
    return ""


def _silent_ranks(silent: list[int]) -> str:
    """Return what it means that these ranks wrote nothing down."""
    if not silent:
        return ""
    ranks, they, were = ("Rank", "it", "was") if len(silent) == 1 else ("Ranks", "they", "were")
    return (
        f"{ranks} {', '.join(map(str, silent))} failed first, without a word: {they} {were} killed (memory that ran "
        f"out? dmesg on that node tells), or hung, or the node or the link to it is down. {_what_to_do()}"
    )


def _late_ranks(others: list[Report], kind: Kind) -> str:
    """Return who was stopped first, or did not come to where the others waited; empty if nobody."""
    for report in others:
        if report.kind is Kind.STOPPED:
            return f"Rank {report.rank} (on {report.node}) was stopped, in {report.where}: {report.why}"
    for report in others:
        if report.kind is Kind.BUSY and kind is Kind.LOST:
            return (
                f"Rank {report.rank} (on {report.node}) did not come: it was still in {report.where}. It hangs, or "
                f"parallel.timeout_s is shorter than its work takes. {_what_to_do()}"
            )
    for report in others:
        if report.kind is Kind.LOST:
            return f"Rank {report.rank} (on {report.node}) waited for it in vain, in {report.where}: {report.why}"
    return ""


def _shortened(why: str) -> str:
    """Return the first line of an error without the place in gloo's source and its advice."""
    line = (why.strip().splitlines() or ["no reason given"])[0]
    if line.startswith("["):
        line = line.partition("] ")[2] or line
    return line.partition(". This is typically")[0][:SHOWN_CHARACTERS]


def _what_to_do() -> str:
    return f"See to that node and its link; {_again()}"


def _again() -> str:
    return "then run the same command again (task=batch and launch/eval.py go on where they were)."


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
