"""Means along a setting: which line a result is on, at which value, and what cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apb_ds.report.compare import main
from apb_ds.report.curves import gather_curves
from apb_ds.report.results import read_results
from tests.result_directories import line, write_result

LINES = [line("a", 1.0), line("b", 0.0)]


def points(content: dict[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    return {one["name"]: [(point["value"], point["mean"]) for point in one["points"]] for one in content["lines"]}


def test_one_line_for_each_choice_of_other_settings(tmp_path: Path) -> None:
    directories = [
        write_result(
            tmp_path / f"{compressor}{hosts}", [line(str(hosts), hosts / 10)], hosts=hosts, compressor=compressor
        )
        for hosts in (8, 2, 4)
        for compressor in ("window", "random")
    ]
    directories.append(write_result(tmp_path / "dense", LINES, "dense"))
    content = gather_curves(read_results(directories), "method.hosts")
    expected = [(2, 0.2), (4, 0.4), (8, 0.8)]
    assert points(content) == {"apb, compressor=window": expected, "apb, compressor=random": expected}
    (level,) = content["levels"]
    assert (level["name"], level["value"], level["mean"], level["samples"]) == ("dense", None, 0.5, 2)
    assert level["interval"] == [0.0, 1.0] and level["prefill_flops"] == {"total": 4e12, "slowest_rank": 2e12}


def test_the_default_ratio_is_shown_as_a_number(tmp_path: Path) -> None:
    directories = [
        write_result(tmp_path / "default", [line("x", kl=0.5)], task="fidelity"),
        write_result(tmp_path / "2", [line("x", kl=0.25)], task="fidelity", compression_ratio=2),
        write_result(tmp_path / "star", [line("x", kl=1.0)], "star", task="fidelity"),
    ]
    content = gather_curves(read_results(directories), "method.compression_ratio")
    assert content["measure"] == "kl" and points(content) == {"apb": [(2, 0.25), (8, 0.5)]}
    assert [level["name"] for level in content["levels"]] == ["star"], "it passes nothing, at no ratio"


@pytest.mark.parametrize(("against", "values"), [("method.hosts", (1, 16)), ("method.compressor", ("knorm", "random"))])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], against: str, values: Any) -> None:
    pytest.importorskip("matplotlib")
    name = against.removeprefix("method.")
    directories = [write_result(tmp_path / str(value), LINES, **{name: value}) for value in values]
    directories.append(write_result(tmp_path / "dense", LINES, "dense"))
    out, figure = tmp_path / "curves.json", tmp_path / "curves.png"
    assert main([*map(str, directories), "--against", against, "--out", str(out), "--figure", str(figure)]) == 0
    assert points(json.loads(out.read_text())) == {"apb": [(value, 0.5) for value in values]}
    assert figure.read_bytes().startswith(b"\x89PNG")
    said = " ".join(capsys.readouterr().out.split())
    for value in values:
        assert f"apb {value} 50.0 0.0 to 100.0 2 4 1.00" in said
    assert "dense - 50.0" in said


@pytest.mark.parametrize(
    ("against", "second", "expected"),
    [
        ("method.hots", {"hosts": 4}, ("'method.hots'", "method.hosts")),
        ("method.hosts", {"compressor": "knorm"}, ("two values", "there is 8", "method.compressor")),
        ("method.hosts", {"hosts": 4, "task": "ruler"}, ("task=passkey", "task=ruler")),
    ],
)
def test_bad_curves_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], against: str, second: dict[str, Any], expected: tuple[str, ...]
) -> None:
    directories = [write_result(tmp_path / "a", LINES), write_result(tmp_path / "b", LINES, **second)]
    assert main([*map(str, directories), "--against", against]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected), said


def test_two_results_at_one_value_are_refused(tmp_path: Path) -> None:
    directories = [write_result(tmp_path / name, LINES, hosts=hosts) for name, hosts in (("a", 2), ("b", 4), ("c", 4))]
    with pytest.raises(ValueError, match=r"b and .*c are both apb at method.hosts=4"):
        gather_curves(read_results(directories), "method.hosts")
