"""Evaluations side by side: which samples make a pair, differences and ratios, names, the command."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from apb_ds.report.compare import compare_records, main
from apb_ds.report.pairing import compare_results
from apb_ds.report.results import read_results
from apb_ds.report.summary import bootstrap_interval, bootstrap_ratio
from tests.result_directories import failed, line, write_result


def pair_of(content: dict[str, Any], job: str, labels: Any = None, measure: str = "score") -> dict[str, Any]:
    wanted = (job, labels, measure)
    return next(pair for pair in content["pairs"] if (pair["job"], pair["labels"], pair["measure"]) == wanted)


def test_difference_over_the_samples_that_both_answered(tmp_path: Path) -> None:
    scores = {"a": (1.0, 0.0), "b": (0.5, 1.0), "c": (1.0, 0.25), "d": (0.0, 0.0)}
    dense = [line(prompt, first) for prompt, (first, _) in scores.items()]
    apb = [line(prompt, second) for prompt, (_, second) in reversed(scores.items())]  # in any order
    dense += [line("exact", 0.0), failed("failed"), line("other"), line("dense alone", 1.0), line("unscored", None)]
    apb += [line("exact", 1.0, exact=True), line("failed", 1.0), failed("other"), line("unscored", 1.0)]
    results = read_results([write_result(tmp_path / "a", apb), write_result(tmp_path / "d", dense, "dense")])
    content = compare_results(results)
    assert content["baseline"] == "dense" and [job["name"] for job in content["jobs"]] == ["apb", "dense"]
    pair = pair_of(content, "apb")
    differences = [-1.0, 0.5, -0.75, 0.0]
    assert pair["difference"] == pytest.approx(sum(differences) / 4)
    assert pair["interval"] == pytest.approx(bootstrap_interval(differences), abs=0.02)
    assert (pair["samples"], pair["exact"], pair["failed"], pair["unpaired"]) == (4, 1, 2, 1)
    assert pair_of(content, "apb", {"length": 8}) == pair | {"labels": {"length": 8}}
    means = {name: numbers["score"] for name, numbers in content["cells"][-1]["jobs"].items()}
    assert means["apb"] == pytest.approx((0 + 1 + 0.25 + 0 + 1 + 1) / 6), "a job's own mean has all its samples"


def test_pairs_by_labels_and_repeated_prompts(tmp_path: Path) -> None:
    def lines(scores: list[float]) -> list[dict[str, Any]]:
        first, second, third, fourth = scores
        far = {"length": 16}
        return [line("a", first), line("a", second), line("a", third, labels=far), line("b", fourth, labels=far)]

    directories = [
        write_result(tmp_path / "dense", lines([0.0, 0.5, 0.0, 0.0]), "dense"),
        write_result(tmp_path / "apb", lines([0.25, 0.5, 0.5, 1.0])),
    ]
    content = compare_results(read_results(directories))
    assert pair_of(content, "apb", {"length": 8})["difference"] == 0.125
    assert pair_of(content, "apb", {"length": 16})["difference"] == 0.75
    assert [cell["labels"] for cell in content["cells"]] == [{"length": 8}, {"length": 16}, None]


@pytest.mark.parametrize(
    ("methods", "baseline"),
    [
        (["apb", "ring", "dense"], "dense"),
        (["apb", "ulysses", "ring"], "ulysses"),
        (["star", "apb"], "star"),
    ],
)
def test_baseline(tmp_path: Path, methods: list[str], baseline: str) -> None:
    directories = [write_result(tmp_path / method, [line("a", 1.0)], method) for method in methods]
    assert compare_results(read_results(directories))["baseline"] == baseline


def test_samples_of_exact_methods_are_not_left_out(tmp_path: Path) -> None:
    lines = [line("a", 1.0, exact=True)]
    directories = [write_result(tmp_path / method, lines, method) for method in ("dense", "ring")]
    assert pair_of(compare_results(read_results(directories)), "ring")["samples"] == 1


def test_divergence_relative_to_star(tmp_path: Path) -> None:
    def fidelity(name: str, **kl: float) -> Path:
        return write_result(
            tmp_path / name, [line(text, kl=value) for text, value in kl.items()], name, task="fidelity"
        )

    directories = [fidelity("dense", x=0.0, y=0.0), fidelity("apb", x=0.1, y=0.3), fidelity("star", x=0.4, y=0.4)]
    content = compare_results(read_results(directories))
    (ratio,) = content["ratios"]
    assert (ratio["job"], ratio["reference"], ratio["samples"]) == ("apb", "star", 2)
    assert ratio["ratio"] == pytest.approx(0.5) and ratio["largest"] == pytest.approx(0.75)
    assert [cell["ratio"] for cell in ratio["cells"]] == pytest.approx([0.25, 0.75])
    assert ratio["interval"] == pytest.approx((0.25, 0.75))
    assert pair_of(content, "apb", measure="kl")["difference"] == pytest.approx(0.2)
    assert pair_of(content, "star", {"text": "y"}, "kl")["difference"] == pytest.approx(0.4)
    (ratio,) = compare_results(read_results(directories), ratio_to="apb")["ratios"]
    assert (ratio["job"], ratio["ratio"]) == ("star", pytest.approx(2.0))


def test_a_job_whose_samples_all_failed(tmp_path: Path) -> None:
    directories = [
        write_result(tmp_path / "dense", [{**failed("x"), "labels": {"text": "x"}}], "dense", task="fidelity"),
        write_result(tmp_path / "star", [line("x", kl=0.4)], "star", task="fidelity"),
    ]
    content = compare_results(read_results(directories))
    pair = pair_of(content, "star", measure="kl")
    assert (pair["samples"], pair["failed"], pair["difference"]) == (0, 1, None)
    assert main([str(directory) for directory in directories]) == 0


def test_no_ratio_over_a_divergence_of_zero(tmp_path: Path) -> None:
    lines = {"star": [line("x", kl=0.0)], "apb": [line("x", kl=0.1), line("y", kl=0.1, exact=True)]}
    directories = [write_result(tmp_path / name, of, name, task="fidelity") for name, of in lines.items()]
    (ratio,) = compare_results(read_results(directories))["ratios"]
    assert (ratio["ratio"], ratio["interval"], ratio["largest"], ratio["unpaired"]) == (None, None, None, 1)


def test_the_interval_of_a_ratio_resamples_pairs() -> None:
    draw = random.Random(0)
    seconds = [draw.uniform(1, 9) for _ in range(50)]
    assert bootstrap_ratio([(2 * second, second) for second in seconds]) == pytest.approx((2.0, 2.0))
    shuffled = draw.sample(seconds, 50)
    interval = bootstrap_ratio([(2 * first, second) for first, second in zip(shuffled, seconds, strict=True)])
    assert interval is not None and interval[0] < 1.8 and interval[1] > 2.2
    assert bootstrap_ratio([(1.0, 1.0)]) is None


def test_names_show_the_settings_that_differ(tmp_path: Path) -> None:
    lines = [line("a", 1.0)]
    directories = [
        write_result(tmp_path / "dense", lines, "dense"),
        write_result(tmp_path / "4", lines, hosts=4),
        write_result(tmp_path / "8", lines, hosts=8, compression_ratio=2),
        write_result(tmp_path / "star", lines, "star"),
    ]
    names = [result.name for result in read_results([*directories, directories[0]])]
    assert names == ["dense", "apb, hosts=4, compression_ratio=default", "apb, hosts=8, compression_ratio=2", "star"]
    same = [directories[0], write_result(tmp_path / "again", lines, "dense")]
    assert [result.name for result in read_results(same)] == [f"dense ({directory})" for directory in same]


def test_names_omit_settings_that_only_some_have(tmp_path: Path) -> None:
    given: dict[str, dict[str, Any]] = {
        "window": {},
        "retaining_heads": {"retaining_heads": "heads"},
        "heads_and_window": {"retaining_heads": "heads"},
    }
    lines = [line("a", 1.0)]
    directories = [write_result(tmp_path / name, lines, compressor=name, **more) for name, more in given.items()]
    assert [result.name for result in read_results(directories)] == [f"apb, compressor={name}" for name in given]
    other = write_result(tmp_path / "other", lines, compressor="retaining_heads", retaining_heads="others")
    assert read_results([*directories, other])[1].name == "apb, compressor=retaining_heads, retaining_heads=heads"


def test_legends_fit_the_figure(tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    lines, legends = [line("a", 1.0)], []
    directories = [
        write_result(
            tmp_path / str(number),
            lines,
            hosts=number,
            compressor="retaining_heads",
            retaining_heads=f"package://some_package/heads/{number}",
        )
        for number in range(1, 13)
    ]

    def keep(figure: Any, *given: Any, **more: Any) -> None:
        figure.draw_without_rendering()
        box, whole = figure.legends[0].get_window_extent(), figure.bbox
        legends.append((box.x0 >= whole.x0 and box.x1 <= whole.x1, figure))

    with mock.patch.object(figures.Figure, "savefig", keep):
        assert main([*map(str, directories), "--figure", str(tmp_path / "x.png")]) == 0
    ((fits, figure),) = legends
    handles, names = figure.axes[0].get_legend_handles_labels()
    looks = {(handle.lines[0].get_color(), handle.lines[0].get_marker()) for handle in handles}
    assert fits and len(set(names)) == len(looks) == 12


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"lines": [line("b", 1.0)]}, ("share no sample", "seed", "--against")),
        ({"lines": [line("a", 1.0, labels={})]}, ("share no sample",)),
        ({"lines": [line("a", 1.0)], "task": "ruler"}, ("task=passkey", "task=ruler")),
        (None, ("two evaluations", "there is 1")),
        ("samples.jsonl", ("samples.jsonl cannot be read", "launch/eval.py")),
        ("summary.json", ("summary.json cannot be read", "same command")),
        ({"samples.jsonl": "{torn"}, ("samples.jsonl, line 1,", "not JSON")),
        ({"samples.jsonl": "{}"}, ("line 1,", "fingerprint")),
        ({"summary.json": "[]"}, ("summary.json is not a JSON object",)),
        ({"summary.json": "{}"}, ("not a summary of launch/eval.py", "settings")),
    ],
)
def test_incomparable_results_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], second: Any, expected: tuple[str, ...]
) -> None:
    directories = [write_result(tmp_path / "a", [line("a", 1.0)])]
    if isinstance(second, dict) and "lines" in second:
        directories.append(write_result(tmp_path / "b", **second))
    elif second is not None:
        directories.append(write_result(tmp_path / "b", [line("a", 1.0)], "star"))
        if isinstance(second, str):
            (tmp_path / "b" / second).unlink()
        else:
            for name, text in second.items():
                (tmp_path / "b" / name).write_text(text)
    assert main([str(directory) for directory in directories]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and all(part in said for part in expected), said


@pytest.mark.parametrize(
    ("task", "expected"), [("fidelity", ("'stare'", "use one of apb", "star")), ("passkey", ("task=fidelity",))]
)
def test_an_unknown_ratio_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, expected: tuple[str, ...]
) -> None:
    lines = [line("a", kl=1.0)] if task == "fidelity" else [line("a", 1.0)]
    directories = [str(write_result(tmp_path / method, lines, method, task=task)) for method in ("apb", "star")]
    assert main([*directories, "--ratio-to", "stare"]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected), said


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    directories = [
        write_result(tmp_path / "dense", [line("a", 1.0), line("b", 1.0)], "dense"),
        write_result(tmp_path / "apb", [line("a", 1.0), line("b", 0.5)]),
    ]
    out, figure = tmp_path / "made" / "compared.json", tmp_path / "drawn" / "compared.png"
    assert main([*map(str, directories), "--out", str(out), "--figure", str(figure)]) == 0
    written = json.loads(out.read_text())
    assert pair_of(written, "apb")["difference"] == -0.25
    assert [job["directory"] for job in written["jobs"]] == [".../dense", ".../apb"], "no paths of this machine"
    assert figure.read_bytes().startswith(b"\x89PNG")
    said = " ".join(capsys.readouterr().out.split())
    assert "all 100.0 75.0" in said and "prefill TFLOP 4 4" in said
    assert "apb 8 2 -25.0 -50.0 to +0.0 0 0 0" in said


def test_no_figure_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("apb_ds.report.figures.importlib.util.find_spec", lambda name: None)
    directories = [str(write_result(tmp_path / method, [line("a", 1.0)], method)) for method in ("apb", "star")]
    assert main([*directories, "--figure", str(tmp_path / "x.png")]) == 2
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def record_of(directory: Path) -> dict[str, Any]:
    return {"task": {"directory": str(directory)}, "metrics": {"cells": []}}


def test_a_sweep_is_compared_within_equal_task_settings(tmp_path: Path) -> None:
    directories = [
        write_result(tmp_path / f"{method}{seed}", [line(str(seed), 1.0)], method, seed=seed)
        for seed in (1, 2)
        for method in ("dense", "apb")
    ]
    alone = write_result(tmp_path / "alone", [line("z", 1.0)], seed=3)
    out = io.StringIO()
    records = [record_of(directory) for directory in (*directories, alone)]
    compare_records([*records, {"status": "failed"}, {"metrics": {"lines": 3}}], Console(file=out, width=120))
    assert out.getvalue().count("difference to dense,") == 2 and "No comparison" not in out.getvalue()
    assert "seed" not in out.getvalue(), "the same within each table"


def test_a_sweep_without_a_comparison_goes_on(tmp_path: Path) -> None:
    directories = [write_result(tmp_path / name, [line(name, 1.0)]) for name in ("a", "b")]
    for records, expected in (
        ([record_of(directory) for directory in directories], "No comparison: "),
        ([record_of(tmp_path / "gone")], "No comparison: "),
        ([], ""),
    ):
        out = io.StringIO()
        compare_records(records, Console(file=out, width=400))
        assert out.getvalue().startswith(expected) and bool(out.getvalue()) == bool(expected)
