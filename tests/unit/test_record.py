"""The record of a job, its tables, and a session of one rank."""

from __future__ import annotations

import io
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.progress import prefill_progress
from apb_ds.report.record import git_state, hardware, versions, write_json
from apb_ds.report.table import format_bytes, swept_names
from apb_ds.session import Job, Session
from tests.unit.test_loading import GEOMETRY

CPU = torch.device("cpu")
SIZE = 64 << 20


def values(**method: Any) -> dict[str, Any]:
    return {
        "model": {"load_format": "dummy", "device": "cpu", "geometry": GEOMETRY},
        "method": {"hosts": 4, **method},
        "task": {"name": "passkey", "num_tokens": 320, "max_new_tokens": 3},
    }


@pytest.fixture
def session() -> Session:
    return Session(console=Console(file=io.StringIO(), width=200))


def printed(session: Session) -> str:
    stream = session.console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    write_json(path, {"a": Path("x"), "b": {3, 1}, "c": torch.tensor(2)})
    assert json.loads(path.read_text()) == {"a": "x", "b": [1, 3], "c": 2}
    with pytest.raises(TypeError, match="does not belong in a record"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == "x"
    assert [item.name for item in path.parent.iterdir()] == ["record.json"]


def test_environment() -> None:
    assert versions()["torch"] and versions()["apb_ds"]
    assert hardware(CPU)["cores"] >= 1
    assert set(git_state()) == {"commit", "dirty"}
    assert git_state(Path("/")) == {"commit": None, "dirty": None}


def test_an_environment_variable_gives_the_commit_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APB_DS_COMMIT", "abc")
    assert git_state() == git_state(Path("/")) == {"commit": "abc", "dirty": None}


def test_peak_memory_is_of_this_job() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    with mmap.mmap(-1, SIZE) as held:  # not by torch, which may reuse memory of other tests
        held.write(b"x" * SIZE)
    assert peak_memory_bytes(CPU) - before > SIZE // 2


def test_format_bytes() -> None:
    assert [format_bytes(number) for number in (0, 1536, 3 << 20, 5 << 30)] == ["0 B", "1.5 KiB", "3.0 MiB", "5.00 GiB"]


def test_no_bar_without_a_terminal() -> None:
    with prefill_progress(Console(file=io.StringIO())) as progress:
        assert progress is None
    console = Console(file=io.StringIO(), force_terminal=True)
    with prefill_progress(console, shown=False) as progress:
        assert progress is None
    with prefill_progress(console) as progress:
        assert progress is not None
        progress(1, 2)


def test_job_leaves_a_record(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = session.run(Job(values(), tmp_path, {"method.hosts": "4"}))
    assert record["status"] == "ok", record["error"]
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(record, default=str))
    metrics = record["metrics"]
    assert (metrics["document_tokens"], metrics["query_tokens"], metrics["new_tokens"]) == (320, 32, 3)
    assert (metrics["hosts"], metrics["ranks"], metrics["rounds"]) == (4, 1, 4)
    assert (metrics["anchor_length"], metrics["passing_length"]) == (33, 10)
    assert metrics["bytes_sent"] == [0]
    assert metrics["prefill_s"] > 0 and metrics["decode_tokens_per_s"] > 0
    assert record["task"]["random_ids"] and record["task"]["ground_truth"] is None
    assert record["exact"] is False and record["seed"] == 0
    for part in ("versions", "hardware", "git", "kernels", "config", "settings", "model"):
        assert record[part]
    out = capsys.readouterr().out
    assert "Ground Truth: none (random token ids)\nPrediction: " in out
    assert "320 / 32" in printed(session)


def test_sweep_goes_on_after_a_failed_job(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs: list[dict[str, Any]] = [
        {"anchor_length": 10},
        {"anchor_length": 40},
        {"compressor": "windw"},
        {"anchor_length": 64},
    ]
    loads = set()
    for number, method in enumerate(jobs):
        overrides = {"method.hosts": "4", **{f"method.{key}": str(value) for key, value in method.items()}}
        session.run(Job(values(**method), tmp_path / str(number), overrides))
        loads.add(id(session._loaded))
    assert [record["status"] for record in session.records] == ["failed", "ok", "failed", "ok"]
    assert len(loads) == 1  # one model for all of them
    assert session.has_failed
    assert "cannot hold the query" in json.loads((tmp_path / "0" / "record.json").read_text())["error"]
    assert capsys.readouterr().err.count("Error:") == 2
    assert swept_names(session.records) == ["method.anchor_length", "method.compressor"]
    before = len(printed(session))
    session.close()
    table = printed(session)[before:]
    assert "anchor_length" in table and "hosts" not in table
    assert table.count("failed") == 2


def test_ranks_that_cannot_join(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(timeout_s: float, watch: None) -> None:
        raise RuntimeError("The server socket has failed to listen: port 29500.\nA page of advice.")

    monkeypatch.setattr("apb_ds.session.session.world_group", refuse)
    session = Session()
    assert session.run(Job(values()))["status"] == "failed" and session.has_failed
    said = capsys.readouterr().err
    assert "port 29500" in said and "--master_port" in said and "advice" not in said and "Traceback" not in said


def test_a_changed_model_config_reloads_the_model(session: Session) -> None:
    session.run(Job(values()))
    first = session._loaded
    changed = values()
    changed["model"]["num_layers"] = 1
    assert session.run(Job(changed))["status"] == "ok"
    assert session._loaded is not first
    assert session.records[1]["model"]["config"]["num_layers"] == 1
