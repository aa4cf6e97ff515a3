"""Sweeps: what they leave in their folder, what each job says, and what it returns to a sweeper that optimizes."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import OmegaConf

from apb_ds.report.compare import compare_records, main
from apb_ds.report.sweep import job_line, write_sweep
from apb_ds.report.table import make_console
from launch.objective import objective_of
from tests.launch_in_process import Ended, run_infer
from tests.result_directories import line, write_result
from tests.tiny_checkpoint import save_checkpoint


def record(overrides: dict[str, str], **parts: Any) -> dict[str, Any]:
    return {"status": "ok", "error": None, "overrides": {"seed": "1", **overrides}, **parts}


def evaluation(directory: Path, method: str) -> dict[str, Any]:
    metrics = {"cells": [], "score": 0.5, "measures": {}, "prefill_s": 1.5, "prefill_flops": None}
    return record({"method": method}, task={"directory": str(directory), "correct": None}, metrics=metrics)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def evaluations(tmp_path: Path) -> list[dict[str, Any]]:
    for method, scores in (("dense", (1.0, 1.0)), ("apb", (1.0, 0.5))):
        lines = [line(prompt, score) for prompt, score in zip("ab", scores, strict=True)]
        write_result(tmp_path / "results" / method, lines, method)
    return [evaluation(tmp_path / "results" / method, method) for method in ("dense", "apb")]


def test_evaluations_of_a_sweep(evaluations: list[dict[str, Any]], tmp_path: Path) -> None:
    """Its folder has the jobs, the comparison and the figure, and the command that compares reads it."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "sweep"
    written = write_sweep(folder, evaluations, compare_records(evaluations, make_console()))
    assert [path.name for path in written] == ["sweep.json", "sweep.csv", "comparison.png"]
    assert all(path.stat().st_size for path in written)
    content = json.loads(written[0].read_text())
    assert [job["overrides"] for job in content["jobs"]] == [{"method": "dense"}, {"method": "apb"}]
    assert content["jobs"][0]["evaluation"] == "../results/dense"
    assert content["comparisons"][0]["pairs"][-1]["difference"] == -0.25
    assert str(tmp_path) not in written[0].read_text()
    again = tmp_path / "again.json"
    assert main([str(folder), "--out", str(again)]) == 0
    assert json.loads(again.read_text())["pairs"] == content["comparisons"][0]["pairs"]


def test_a_sweep_without_matplotlib(evaluations: list[dict[str, Any]], tmp_path: Path) -> None:
    comparisons = compare_records(evaluations, make_console())
    with mock.patch("apb_ds.report.sweep.importlib.util.find_spec", lambda name: None):
        written = write_sweep(tmp_path / "sweep", evaluations, comparisons)
    assert [path.name for path in written] == ["sweep.json", "sweep.csv"]


def test_questions_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"prefill_s": 1.25, "bytes_sent": [1, 2], "prefill_flops": {"total": 8.0}}
    records = [
        record({"method.hosts": "2"}, metrics=metrics, task={"correct": True}, exact=False),
        record({"method.hosts": "0"}) | {"status": "failed", "error": "hosts=0, and no more"},
    ]
    write_sweep(tmp_path, records)
    first, second = rows(tmp_path / "sweep.csv")
    assert "seed" not in first
    assert (first["job"], first["method.hosts"], first["status"], first["correct"]) == ("0", "2", "ok", "true")
    assert (first["metrics.prefill_s"], first["metrics.bytes_sent"]) == ("1.25", "[1, 2]")
    assert first["metrics.prefill_flops.total"] == "8.0"
    assert (second["status"], second["error"], second["metrics.prefill_s"]) == ("failed", "hosts=0, and no more", "")
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no evaluations" in said and "sweep.csv" in said


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"metrics": {"prefill_s": 1.234}, "task": {"correct": False}}, ": ok, prefill 1.23 s, wrong, PATH"),
        (
            {"metrics": {"prefill_s": 1.0}, "task": {"correct": None, "prediction": "One\ntwo " + "x" * 80}},
            f": ok, prefill 1.00 s, answer: One two {'x' * 52}..., PATH",
        ),
        (
            {"metrics": {"prefill_s": 1.0, "lines": 6, "answered": 3, "resumed": 2}, "status": "failed"},
            " failed: Why. (prefill 1.00 s, answered 5 of 6, PATH)",
        ),
        ({"metrics": {"prefill_s": None, "cells": [], "score": 0.5, "measures": {}}}, ": ok, score 50.0, PATH"),
        ({"metrics": {"cells": [], "score": None, "measures": {"kl": {"mean": 0.1234}}}}, ": ok, kl 0.1234, PATH"),
        ({"status": "failed"}, " failed: Why. (PATH)"),
    ],
)
def test_a_job_says_one_line(parts: dict[str, Any], said: str) -> None:
    where = Path("sweep/3/record.json")
    line = job_line(3, {"method.hosts": "2"}, record({}) | {"error": "Why."} | parts, where)
    assert line == f"Job 3 (method.hosts=2){said.replace('PATH', 'sweep/3/record.json')}"


def test_objectives() -> None:
    job = record({}, metrics={"prefill_s": 1.5, "prefill_flops": {"total": 2}, "kind": "x"})
    assert objective_of(job, None) is None
    assert objective_of(job, "metrics.prefill_s") == 1.5
    assert objective_of(job, ["metrics.prefill_s", "metrics.prefill_flops.total"]) == (1.5, 2.0)
    assert math.isnan(objective_of(job | {"status": "failed"}, "metrics.prefill_s"))
    for path in ("metrics.prefil_s", "metrics.kind", "metrics"):
        with pytest.raises(ValueError, match=f"objective={path} is not a number"):
            objective_of(job, path)
    with pytest.raises(ValueError, match=r"Did you mean 'metrics.prefill_s'\?"):
        objective_of(job, "metrics.prefil_s")


# --- through launch/infer.py


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("sweep") / "model")


def sweep(model_path: Path, directory: Path, *overrides: str) -> Ended:
    prompt = ["task=prompt", "task.document=A lamp stands on the pier.", "task.query=What?", "task.max_new_tokens=2"]
    common = [f"model.path={model_path}", "model.device=cpu", f"hydra.sweep.dir={directory}"]
    return run_infer(0, 1, ["-m", *common, *prompt, *overrides])


def test_a_sweep_keeps_its_table(model_path: Path, tmp_path: Path) -> None:
    ended = sweep(model_path, tmp_path, "method.hosts=1,2,0", "seed=3")
    assert ended.code == 2
    jobs = [text.partition(")")[0] for text in ended.stdout.splitlines() if text.startswith("Job ")]
    assert jobs == ["Job 0 (method.hosts=1", "Job 1 (method.hosts=2", "Job 2 (method.hosts=0"]
    assert (ended.stdout + ended.stderr).count("method.hosts=0 must be") == 1
    assert "Ran " not in ended.stdout and "Record: " not in ended.stdout
    kept = rows(tmp_path / "sweep.csv")
    assert [(row["method.hosts"], row["status"]) for row in kept] == [("1", "ok"), ("2", "ok"), ("0", "failed")]
    assert f"{tmp_path}/sweep.json" in ended.stdout


OPTIMIZER = "hydra.sweeper._target_=hydra_plugins.apb_ds_sweep.Asking"


@contextlib.contextmanager
def optimizer(seen: list[Any], choices: Sequence[str]) -> Iterator[None]:
    """Make a sweeper of the class that `OPTIMIZER` names: it asks for one job at a time."""
    plugins, module = Plugins.instance(), sys.modules["hydra_plugins.apb_ds_sweep"]

    class Asking(module.OneByOneSweeper):  # type: ignore[name-defined,misc]
        def sweep(self, arguments: list[str]) -> None:
            for number, choice in enumerate(choices):
                (job,) = self.launcher.launch([[*arguments, choice]], initial_job_idx=number)
                try:
                    seen.append(job.return_value)
                except HydraException as error:
                    seen.append(str(error))
            if "the job failed" in str(seen[0]):
                raise HydraException(seen[0])

    Asking.__module__, Asking.__qualname__ = module.__name__, "Asking"
    with (
        mock.patch.object(module, "Asking", Asking, create=True),
        mock.patch.dict(plugins.class_name_to_class, {"hydra_plugins.apb_ds_sweep.Asking": Asking}),
    ):
        yield


def test_a_sweeper_gets_the_objective(model_path: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    choices = ["method.hosts=1", "method.hosts=0", "method=nope", "method.compressor=nope"]
    with optimizer(seen, choices):
        ended = sweep(model_path, tmp_path, OPTIMIZER, "objective=[metrics.prefill_s]")
    assert seen[0] == (ended.records[0]["metrics"]["prefill_s"],)
    assert len(seen) == 4 and all("the job failed" in said and "max_failure_rate" in said for said in seen[1:])
    assert [row["status"] for row in rows(tmp_path / "sweep.csv")] == ["ok", "failed", "failed", "failed"]


def test_an_optimizer_that_stops_leaves_the_table(model_path: Path, tmp_path: Path) -> None:
    with optimizer([], ["method.hosts=0"]):
        ended = sweep(model_path, tmp_path, OPTIMIZER, "objective=metrics.prefill_s")
    assert ended.code == 2 and "Error: the job failed" in ended.stderr
    assert [row["status"] for row in rows(tmp_path / "sweep.csv")] == ["failed"]


def test_an_optimizer_needs_an_objective(model_path: Path, tmp_path: Path) -> None:
    with optimizer([], ["method.hosts=2"]):
        ended = sweep(model_path, tmp_path, OPTIMIZER)
    assert ended.code == 2 and ended.records == [] and "objective=metrics.prefill_s" in ended.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": {"seed": 0}, "storage": None}, None),
        ({"n_trials": 2}, r"every rank runs the sweeper.*hydra\.sweeper\.sampler\.seed=0"),
        ({"sampler": {"seed": None}}, "without a seed"),
        ({"sampler": {"seed": 0}, "storage": "sqlite:///x.db"}, "storage is for a single process"),
    ],
)
def test_an_optimizer_on_several_ranks(settings: dict[str, Any], said: str | None) -> None:
    """Each rank refuses alone, when the sweep is set up, what would have the ranks run other jobs than each other."""
    Plugins.instance()
    check = sys.modules["hydra_plugins.apb_ds_sweep"]._check_optimizer
    config = OmegaConf.create({"objective": "metrics.prefill_s", "hydra": {"sweeper": settings}})
    check(config)
    refused = contextlib.nullcontext() if said is None else pytest.raises(HydraException, match=said)
    with mock.patch("apb_ds.parallel.launcher.launched_world_size", lambda: 2), refused:
        check(config)


def test_ranks_shuffle_alike(model_path: Path, tmp_path: Path) -> None:
    """Hydra's shuffle(...) draws from Python's generator, which ranks do not share."""
    orders: list[list[str]] = []
    module = sys.modules["hydra_plugins.apb_ds_sweep"]

    def launch(self: Any, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        orders.append([job[-1] for job in jobs])
        return []

    for _ in range(2):
        with (
            mock.patch.object(module.OneByOneLauncher, "launch", launch),
            mock.patch("launch.common.launched_world_size", lambda: 2),
        ):
            assert sweep(model_path, tmp_path, "method.seed=shuffle(range(20))").code == 0
    assert orders[0] == orders[1] and sorted(orders[0]) != orders[0]


def test_an_objective_that_no_record_has_ends_the_sweep(model_path: Path, tmp_path: Path) -> None:
    ended = sweep(model_path, tmp_path, "objective=metrics.prefil_s", "method.hosts=1,2")
    assert ended.code == 2 and len(ended.records) == 1
    assert "objective=metrics.prefil_s" in ended.stderr and "'metrics.prefill_s'" in ended.stderr


def test_a_launcher_of_other_processes(model_path: Path, tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    Plugins.instance()
    module = sys.modules["hydra_plugins.apb_ds_sweep"]

    def launch(self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        work = joblib.delayed(self.task_function)
        return joblib.Parallel(n_jobs=2)(work(overrides) for overrides in job_overrides)

    with mock.patch.object(module.OneByOneLauncher, "launch", launch):
        ended = sweep(model_path, tmp_path, "method.hosts=1,2")
    assert ended.code == 2 and "Traceback" not in ended.stderr
    assert "hydra/launcher" in ended.stderr and len(ended.stderr.splitlines()) == 1, ended.stderr
