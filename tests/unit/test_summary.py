"""Means by label, intervals, and which samples count."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from apb_ds.report.figures import draw_scores
from apb_ds.report.summary import bootstrap_interval, summarise
from apb_ds.report.table import job_table


def result(score: float | None, **changes: Any) -> dict[str, Any]:
    base = {
        "labels": {"length": 8},
        "score": score,
        "exact": False,
        "approximate": True,
        "prefill_s": 1.0,
        "seconds": 2.0,
    }
    return base | changes


def test_means_by_label() -> None:
    results = [
        result(1.0),
        result(0.0),
        result(0.5, labels={"length": 16}, seconds=4.0),
    ]
    summary = summarise(results)
    assert summary["all"]["score"] == pytest.approx(0.5) and summary["all"]["samples"] == 3
    assert summary["all"]["seconds"] == pytest.approx(8 / 3)
    assert [cell["labels"] for cell in summary["cells"]] == [{"length": 8}, {"length": 16}]
    assert [cell["score"] for cell in summary["cells"]] == [0.5, 0.5]


def test_exact_samples_of_an_approximate_method_are_left_out() -> None:
    results = [result(1.0), result(0.0, exact=True)]
    numbers = summarise(results)["all"]
    assert (numbers["score"], numbers["exact"], numbers["score_with_exact"]) == (1.0, 1, 0.5)
    numbers = summarise([one | {"approximate": False} for one in results])["all"]
    assert (numbers["score"], numbers["exact"]) == (0.5, 0), "an exact method is exact on purpose"


def test_failed_and_unscored_samples() -> None:
    results = [result(1.0), {"labels": {"length": 8}, "error": "no", "approximate": True}, result(None)]
    numbers = summarise(results)["all"]
    assert (numbers["samples"], numbers["failed"], numbers["score"]) == (3, 1, 1.0)
    nothing = summarise([{"labels": {}, "error": "no", "approximate": True}])["all"]
    assert (nothing["score"], nothing["interval"], nothing["seconds"]) == (None, None, None)


def test_measures() -> None:
    results = [
        result(None, measures={"kl": 0.1, "perplexity": None}),
        result(None, measures={"kl": 0.3, "perplexity": 2.0}),
    ]
    results.append(result(None, measures={"kl": 9.0, "perplexity": 9.0}, exact=True))
    measures = summarise(results)["all"]["measures"]
    assert measures["kl"]["mean"] == pytest.approx(0.2) and measures["perplexity"] == {"mean": 2.0, "interval": None}


def test_operations_of_a_prefill() -> None:
    counted = [result(1.0, flops={"total": total, "slowest_rank": total // 2, "query": 1}) for total in (4, 8)]
    summary = summarise([*counted, result(1.0, labels={"length": 16}, flops=None)])
    assert summary["all"]["prefill_flops"] == {"total": 6, "slowest_rank": 3}
    assert summary["cells"][1]["prefill_flops"] is None


def test_a_cell_without_measures_keeps_its_row() -> None:
    results = [result(None, measures={"kl": 0.25, "top1": 1.0}), result(None, labels={"length": 16}, exact=True)]
    summary = summarise(results)
    out = io.StringIO()
    Console(file=out, width=120).print(job_table({"metrics": {**summary["all"], "cells": summary["cells"]}}))
    assert "16 1 - - 0 1 1.00" in " ".join(out.getvalue().split())


def test_the_interval_has_its_nominal_coverage() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(60):
        low, high = bootstrap_interval([draw.gauss(3.0, 1.0) for _ in range(60)]) or (0.0, 0.0)
        hits += low <= 3.0 <= high
    assert 50 <= hits <= 60  # 95% of 60 is 57


def test_the_interval_is_deterministic_and_needs_two_values() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval([1.0]) is None and bootstrap_interval([]) is None


@pytest.mark.parametrize(
    "labels",
    [
        [{"length": length, "depth": depth} for length in (8, 16) for depth in (0.0, 0.5)],
        [{"task": name} for name in ("one", "two")],
        [{}],
    ],
)
def test_figures(labels: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [{"labels": label, "score": 0.5, "exact": 0, "interval": (0.4, 0.7)} for label in labels]
    assert draw_scores(tmp_path / "scores.png", "title", cells)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_scores(tmp_path / "none.png", "title", [{**cells[0], "score": None}])


def test_no_figure_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("apb_ds.report.figures.importlib.util.find_spec", lambda name: None)
    assert not draw_scores(tmp_path / "scores.png", "title", [{"labels": {}, "score": 1.0, "exact": 0}])
    assert "pip install" in caplog.text and not list(tmp_path.iterdir())
