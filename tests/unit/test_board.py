"""Which rank failed first, according to the ranks' reports."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from apb_ds.parallel.failure import board
from apb_ds.parallel.failure.board import Board, LostRankError, lost_ranks_named
from apb_ds.parallel.failure.progress import Progress
from apb_ds.parallel.failure.reports import RESTART, Kind, Report, diagnose

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:55732. This is typically caused by a crash."  # noqa: E501
WHERE = "prefill, round 2 of 4, layer 12"


@pytest.fixture(autouse=True)
def on_node0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node0")


def report(rank: int, kind: Kind, why: str = "") -> Report:
    return Report(rank, kind, f"query, layer {rank}", why, f"node{rank}")


def mine(rank: int, kind: Kind, why: str) -> Report:
    return Report(rank, kind, WHERE, why, f"node{rank}")


LOST = {rank: report(rank, Kind.LOST, "Connection closed by peer") for rank in range(4)}


def without(*ranks: int) -> dict[int, Report]:
    return {rank: LOST[rank] for rank in LOST if rank not in ranks}


@pytest.mark.parametrize(
    ("reports", "parts"),
    [
        (without(2), ("Rank 2 failed first", "without an error report", "dmesg", "rerun the same command")),
        (without(2, 3), ("Ranks 2, 3 failed first", "without an error report", "link to it is down")),
        (
            {**without(2, 3), 3: report(3, Kind.RAISED, "boom")},
            ("Rank 3 (on node3) failed first, in query, layer 3: boom.",),
        ),
        ({**without(2), 2: report(2, Kind.STOPPED, "it got SIGTERM.")}, ("Rank 2 (on node2) was stopped",)),
        ({**without(2), 2: report(2, Kind.BUSY)}, ("Rank 2 (on node2) did not join", "query, layer 2", "timeout_s")),
        ({1: LOST[1]}, ("Ranks 0, 2, 3 failed first",)),
        (without(1), ("Rank 0 (on node0) gave up waiting", "query, layer 0")),
        (None, ("Rank 0 (on node0) failed first or cannot be reached",)),
    ],
)
def test_the_message_of_a_rank_whose_collective_fails(reports: Any, parts: tuple[str, ...]) -> None:
    message = diagnose(mine(1, Kind.LOST, GLOO), 4, reports)
    assert message.startswith(f"rank 1 cannot continue in {WHERE}. ")
    assert message.endswith("(Connection closed by peer [10.0.0.2]:55732)"), "neither gloo's source nor its advice"
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "reports",
    [without(2), {**without(2), 2: report(2, Kind.BUSY)}, {**LOST, 2: report(2, Kind.RAISED, "boom")}, None, {}],
)
def test_the_advice_is_the_boards(reports: Any) -> None:
    first, _ = boards(2)
    first.advice = RESTART
    for message in (
        diagnose(mine(1, Kind.LOST, GLOO), 4, reports, advice=RESTART),
        first.diagnose(Kind.LOST, GLOO, grace_s=0),
    ):
        assert RESTART in message and "rerun" not in message


def test_a_rank_that_raised_blames_no_other() -> None:
    assert diagnose(mine(1, Kind.RAISED, "ValueError: no"), 4, {}) == f"rank 1 failed in {WHERE}: ValueError: no"


def test_earlier_reports_count_if_the_board_is_gone() -> None:
    known = {0: report(0, Kind.RAISED, "out of memory")}
    message = diagnose(mine(1, Kind.LOST, GLOO), 4, None, known)
    assert "Rank 0 (on node0) failed first, in query, layer 0: out of memory." in message
    assert "cannot be reached" not in message


def test_a_stopped_rank_names_the_rank_that_failed() -> None:
    message = diagnose(mine(3, Kind.STOPPED, "it got SIGTERM."), 4, without(2))
    assert message.startswith(f"rank 3 was stopped in {WHERE}: it got SIGTERM. Rank 2 failed first")


def boards(size: int) -> list[Board]:
    store = torch.distributed.HashStore()
    return [Board(store, rank, size, Progress()) for rank in range(size)]


def test_a_board_keeps_the_first_report_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "SERVER_STAYS_S", 0)
    first, second, _ = boards(3)
    assert not first.has_reports()
    second.progress.enter_layer("prefill", 11, 1, 4)
    second.post(Kind.BUSY)
    assert first.has_reports() and first.read()[1].kind is Kind.BUSY
    second.post(Kind.RAISED, "boom\nand more")
    second.post(Kind.STOPPED, "later")
    first.post(Kind.LOST, GLOO)
    reports = second.read_all(0)
    assert {rank: (found.kind, found.why) for rank, found in reports.items()} == {
        0: (Kind.LOST, "Connection closed by peer [10.0.0.2]:55732"),
        1: (Kind.RAISED, "boom"),
    }
    assert reports[0].where == "start" and reports[1].where == WHERE


@pytest.mark.parametrize("others_had_time", [True, False])
def test_what_a_rank_has_answered_is_remembered(monkeypatch: pytest.MonkeyPatch, others_had_time: bool) -> None:
    """The store goes with the first rank, after this rank has read it: perhaps too early for a rank's silence."""
    monkeypatch.setattr(board, "SERVER_STAYS_S", 0)
    monkeypatch.setattr(board, "GRACE_S", 0)
    first, second, _ = boards(3)
    first.post(Kind.LOST, GLOO)
    if others_had_time:
        second.answer()
    else:
        with monkeypatch.context() as patch, pytest.raises(ConnectionError):
            patch.setattr(Board, "read_all", raise_connection_error)
            second.answer()
    monkeypatch.setattr(second, "_store", None)
    message = second.diagnose(Kind.LOST, GLOO, grace_s=0)
    assert ("Rank 2 failed first" if others_had_time else "Rank 0 (on ") in message
    assert ("Rank 2" in message) == others_had_time


def raise_connection_error(self: Board, grace_s: float) -> None:
    raise ConnectionError


def test_a_failed_rank_is_diagnosed_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "SERVER_STAYS_S", 0)
    first, second = boards(2)
    first.progress.enter_layer("decode", 3)
    assert first.diagnose(Kind.RAISED, "boom", grace_s=0) == "rank 0 failed in decode, layer 4: boom"
    assert "failed first, in decode, layer 4: boom." in second.diagnose(Kind.LOST, GLOO, grace_s=0)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("Application timeout caused pair closure"),
        torch.distributed.DistBackendError("NCCL: remote process exited"),
    ],
)
def test_a_failed_collective_is_a_lost_rank(error: RuntimeError) -> None:
    with pytest.raises(LostRankError, match=r"^Application|^NCCL|Connection closed"), lost_ranks_named(None):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("sizes do not match"), ValueError("gloo"), torch.OutOfMemoryError("no")]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, lost_ranks_named(None):
        raise error
    assert caught.value is error


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    assert board._within(0.05, threading.Event().wait) is None
    assert board._within(5, lambda: 3) == 3


def test_progress_counts_from_one() -> None:
    progress = Progress()
    assert str(progress) == "start"
    progress.enter_layer("prefill", 0, 0, 2)
    assert str(progress) == "prefill, round 1 of 2, layer 1"
    progress.enter_layer("decode", 3)
    assert str(progress) == "decode, layer 4"
    progress.leave_model()
    assert str(progress) == "between forwards"
