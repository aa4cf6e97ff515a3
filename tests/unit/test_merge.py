"""Merging evaluations of a benchmark's tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from apb_ds.report.merge import main
from apb_ds.report.pairing import compare_results
from apb_ds.report.results import read_results
from tests.result_directories import failed, line, write_result


def test_a_merge_equals_one_evaluation(tmp_path: Path) -> None:
    first = [line("a", 1.0), line("b", 0.0, exact=True), failed("c")]
    second = [line("d", 0.5, labels={"length": 16})]
    parts = [
        write_result(tmp_path / "one", first, tasks=["x", "y"], hosts=4),
        write_result(tmp_path / "two", second, tasks=["z"], hosts=4),
    ]
    assert main([*map(str, parts), "--out", str(tmp_path / "merged")]) == 0
    whole = write_result(tmp_path / "whole", first + second, tasks=["x", "y", "z"], hosts=4)
    merged, expected = read_results([tmp_path / "merged", whole])
    assert merged.settings == expected.settings and merged.samples == expected.samples
    assert merged.summary == expected.summary
    assert compare_results([merged, expected])["pairs"][-1]["difference"] == 0.0


def test_evaluations_that_do_not_fit_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_result(tmp_path / "one", [line("a", 1.0)], tasks=["x"])
    others = {
        "differ in method.hosts": write_result(tmp_path / "hosts", [line("a", 1.0)], tasks=["y"], hosts=4),
        "differ in seed": write_result(tmp_path / "seed", [line("a", 1.0)], tasks=["y"], seed=1),
        "x: more than one": write_result(tmp_path / "same", [line("b", 1.0)], tasks=["x"]),
        "differ in task": write_result(tmp_path / "other", [line("b", 1.0)], task="synthetic", tasks=["y"]),
    }
    for message, other in others.items():
        assert main([str(one), str(other), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    part = write_result(tmp_path / "part", [line("b", 1.0)], tasks=["y"])
    assert main([str(one), str(part), "--out", str(tmp_path / "one")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
