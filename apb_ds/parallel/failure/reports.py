"""What ranks say of themselves when one is lost, and what follows from it: who failed first, in words for people."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from apb_ds.parallel.failure import place

SHOWN_CHARACTERS = 600


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
    return f"rank {rank} cannot go on in {where}. {cause} ({shortened(why)})"


def _told_failure(others: list[Report]) -> str:
    """Return who has an error of its own; empty if nobody."""
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


def shortened(why: str) -> str:
    """Return the first line of an error without the place in gloo's source and its advice."""
    line = (why.strip().splitlines() or ["no reason given"])[0]
    if line.startswith("["):
        line = line.partition("] ")[2] or line
    return line.partition(". This is typically")[0][:SHOWN_CHARACTERS]


def _what_to_do() -> str:
    return f"See to that node and its link; {_again()}"


def _again() -> str:
    return "then run the same command again (task=batch and launch/eval.py go on where they were)."
