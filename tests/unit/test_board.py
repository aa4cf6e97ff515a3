"""Who failed first, as the ranks' reports tell it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apb_ds.parallel.failure import board, place
from apb_ds.parallel.failure.board import Board, Kind, LostRankError, Report, diagnose, lost_ranks_named
from apb_ds.parallel.failure.place import Place

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:55732. This is typically caused by a crash."  # noqa: E501


@pytest.fixture(autouse=True)
def in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_here", Place("prefill", 1, 4, 11))
    monkeypatch.setenv("MASTER_ADDR", "node0")


def report(rank: int, kind: Kind, why: str = "") -> Report:
    return Report(rank, kind, f"query, layer {rank}", why, f"node{rank}")


LOST = {rank: report(rank, Kind.LOST, "Connection closed by peer") for rank in range(4)}


def without(*ranks: int) -> dict[int, Report]:
    return {rank: LOST[rank] for rank in LOST if rank not in ranks}


@pytest.mark.parametrize(
    ("reports", "parts"),
    [
        (without(2), ("Rank 2 failed first, without a word: it was killed", "dmesg", "run the same command again")),
        (without(2, 3), ("Ranks 2, 3 failed first, without a word: they were killed", "link to it is down")),
        (
            {**without(2, 3), 3: report(3, Kind.RAISED, "boom")},
            ("Rank 3 (on node3) failed first, in query, layer 3: boom.",),
        ),
        ({**without(2), 2: report(2, Kind.STOPPED, "it got SIGTERM.")}, ("Rank 2 (on node2) was stopped",)),
        ({**without(2), 2: report(2, Kind.BUSY)}, ("Rank 2 (on node2) did not come", "query, layer 2", "timeout_s")),
        ({1: LOST[1]}, ("Ranks 0, 2, 3 failed first",)),
        (None, ("Rank 0 (on node0) failed first or cannot be reached",)),
    ],
)
def test_what_a_rank_says_when_its_collective_fails(reports: Any, parts: tuple[str, ...]) -> None:
    said = diagnose(1, 4, reports, Kind.LOST, GLOO)
    assert said.startswith("rank 1 cannot go on in prefill, round 2 of 4, layer 12. ")
    assert said.endswith("(Connection closed by peer [10.0.0.2]:55732)"), "no place in gloo's source, no advice of it"
    for part in parts:
        assert part in said


def test_an_error_of_its_own_needs_nobody_else() -> None:
    said = diagnose(1, 4, {}, Kind.RAISED, "ValueError: no")
    assert said == "rank 1 failed in prefill, round 2 of 4, layer 12: ValueError: no"


def test_what_was_read_before_counts_where_the_board_is_gone() -> None:
    known = {0: report(0, Kind.RAISED, "out of memory")}
    said = diagnose(1, 4, None, Kind.LOST, GLOO, remembered=known)
    assert "Rank 0 (on node0) failed first, in query, layer 0: out of memory." in said
    assert "cannot be reached" not in said


def test_a_rank_that_is_stopped_says_for_whom() -> None:
    said = diagnose(3, 4, without(2), Kind.STOPPED, "it got SIGTERM.")
    assert said.startswith("rank 3 was stopped in prefill, round 2 of 4, layer 12: it got SIGTERM. Rank 2 failed first")


def boards(size: int) -> list[Board]:
    store = torch.distributed.HashStore()
    return [Board(store, rank, size) for rank in range(size)]


def test_a_board_keeps_the_first_word_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "SERVER_STAYS_S", 0)
    first, second, _ = boards(3)
    assert not first.has_reports()
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
    assert reports[1].where == "prefill, round 2 of 4, layer 12"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("Application timeout caused pair closure"),
        torch.distributed.DistBackendError("NCCL: remote process exited"),
    ],
)
def test_a_failed_collective_names_ranks(error: RuntimeError) -> None:
    with pytest.raises(LostRankError), lost_ranks_named():
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("sizes do not match"), ValueError("gloo"), torch.OutOfMemoryError("no")]
)
def test_an_error_that_is_no_lost_rank_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, lost_ranks_named():
        raise error
    assert caught.value is error


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    import threading

    assert board._within(0.05, threading.Event().wait) is None
    assert board._within(5, lambda: 3) == 3


def test_places_read_from_one() -> None:
    assert str(Place("prefill", 0, 2, 0)) == "prefill, round 1 of 2, layer 1"
    assert str(Place("decode", layer_idx=3)) == "decode, layer 4" and str(place.BETWEEN) == "between forwards"
