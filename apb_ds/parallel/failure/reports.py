"""What ranks report when one is lost, and the diagnosis: which rank failed first, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

SHOWN_CHARACTERS = 600
RERUN = "rerun the same command: batch jobs and evaluations resume where they stopped."
RESTART = "start the server again, or have a supervisor do so."
CHECK_NODE = "Check the node and its network link, then"


class Kind(StrEnum):
    """What happened to the rank that reports."""

    RAISED = "raised"  # it raised an error
    STOPPED = "stopped"  # it got a signal, or its launcher exited
    LOST = "lost"  # its collective failed
    BUSY = "busy"  # it was alive when another rank failed


@dataclass(frozen=True)
class Report:
    """What one rank reports.

    Attributes
    ----------
    where : its progress
    why : the error
    node : its hostname
    """

    rank: int
    kind: Kind
    where: str
    why: str = ""
    node: str = ""

    def __str__(self) -> str:
        return f"Rank {self.rank} (on {self.node})"


def diagnose(
    mine: Report,
    world_size: int,
    reports: dict[int, Report] | None,
    remembered: dict[int, Report] | None = None,
    *,
    advice: str = RERUN,
) -> str:
    """Return the message that a rank ends with.

    Parameters
    ----------
    mine : this rank's report
    reports : of the ranks that wrote one; None if the board cannot be read
    remembered : reports that were read earlier, perhaps before all ranks had written theirs
    advice : what to do once the cause is mended
    """
    if mine.kind is Kind.RAISED:
        return f"rank {mine.rank} failed in {mine.where}: {mine.why}"
    others = [report for report in (reports or remembered or {}).values() if report.rank != mine.rank]
    cause = _raised(others, advice)
    if not cause and reports is not None:
        silent = [rank for rank in range(world_size) if rank not in reports and rank != mine.rank]
        cause = _silent(silent, advice)
    cause = cause or _late(others, mine.kind, advice)
    if not cause and reports is None and mine.rank > 0:
        cause = (
            f"Rank 0 (on {os.environ.get('MASTER_ADDR', 'its node')}) failed first or cannot be reached: it was killed "
            "(check dmesg there for an OOM kill), or its node or the link to it is down. See its own message, if it "
            f"printed one. {CHECK_NODE} {advice}"
        )
    if mine.kind is Kind.STOPPED:
        return f"rank {mine.rank} was stopped in {mine.where}: {mine.why} {cause}".rstrip()
    cause = (
        cause or f"No rank reported an error: one of them hung, or a link was down for a while. {CHECK_NODE} {advice}"
    )
    return f"rank {mine.rank} cannot continue in {mine.where}. {cause} ({shortened(mine.why)})"


def _raised(others: Iterable[Report], advice: str) -> str:
    """Return which rank raised an error; empty if none did."""
    for report in others:
        if report.kind is Kind.RAISED:
            why = report.why if report.why.endswith((".", ")")) else f"{report.why}."
            return f"{report} failed first, in {report.where}: {why} Fix it, then {advice}"
    return ""


def _silent(ranks: Iterable[int], advice: str) -> str:
    """Return what it means that these ranks reported nothing; empty if there are none."""
    numbers = ", ".join(map(str, ranks))
    if not numbers:
        return ""
    return (
        f"Rank{'s' if ',' in numbers else ''} {numbers} failed first, without an error report: killed (check dmesg on "
        f"the node for an OOM kill), hung, or the node or the link to it is down. {CHECK_NODE} {advice}"
    )


def _late(others: Iterable[Report], kind: Kind, advice: str) -> str:
    """Return which rank was stopped first, or did not reach the collective that others waited in; else empty."""
    by_kind = {report.kind: report for report in reversed(list(others))}
    if stopped := by_kind.get(Kind.STOPPED):
        return f"{stopped} was stopped, in {stopped.where}: {stopped.why}"
    if kind is Kind.LOST and (busy := by_kind.get(Kind.BUSY)):
        return (
            f"{busy} did not join: it was still in {busy.where}. It hangs, or timeout_s is too short for its work. "
            f"{CHECK_NODE} {advice}"
        )
    if lost := by_kind.get(Kind.LOST):
        return f"{lost} gave up waiting for it, in {lost.where}: {lost.why}"
    return ""


def shortened(why: str) -> str:
    """Return the first line of an error, without the source location and the advice that gloo adds."""
    line = (why.strip().splitlines() or ["no reason given"])[0]
    if line.startswith("["):
        line = line.partition("] ")[2] or line
    return line.partition(". This is typically")[0][:SHOWN_CHARACTERS]
