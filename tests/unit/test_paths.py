"""Records and logs without this machine's paths."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from apb_ds.report.paths import PathHidingFormatter, hide_paths
from apb_ds.session import Job, Session
from tests.tiny_checkpoint import save_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a project in it, the working directory."""
    (tmp_path / "jo" / "project" / "run").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "jo"))
    monkeypatch.chdir(tmp_path / "jo" / "project")
    return tmp_path / "jo"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("{home}/project/run/record.json", "./record.json"),
        ("{home}/project/data/x.txt", "./data/x.txt"),
        ("there is no file {home}/.cache/apb_ds/gguf/ab12.", "there is no file ~/.cache/apb_ds/gguf/ab12."),
        ("{home}", "~"),
        ("{home}anna/x", ".../x"),
        (
            "model.path='/data/models/Llama-3.1-8B': /data/x is damaged",
            "model.path='.../Llama-3.1-8B': .../x is damaged",
        ),
        ("/data", ".../data"),
        ("(/a/b, /c/d)", "(.../b, .../d)"),
        ("and/or 1/2 a / b ./x ../y ~/z https://x.org/a/b package://a/b.gguf meta/llama", None),
        ("50% of 3 // 4", None),
    ],
)
def test_texts(home: Path, text: str, hidden: str | None) -> None:
    text = text.replace("{home}", str(home))
    assert hide_paths(text, home / "project" / "run") == (text if hidden is None else hidden)


def test_written_text_is_kept(home: Path) -> None:
    record = {
        "config": {"task": {"document": "see /etc/hosts", "query": "@/home/jo/q.txt"}, "model": {"path": "/m/x"}},
        "task": {"prediction": "/bin/sh", "turns": [{"question": "/a/b?", "answer": "/c", "error": "/d/e"}], "n": 3},
        "overrides": {"task.document": "@@/not/a/file", "task.input": Path("/x/y.jsonl")},
        "none": None,
        "number": 0.5,
    }
    assert hide_paths(record) == {
        "config": {"task": {"document": "see /etc/hosts", "query": "@.../q.txt"}, "model": {"path": ".../x"}},
        "task": {"prediction": "/bin/sh", "turns": [{"question": "/a/b?", "answer": "/c", "error": ".../e"}], "n": 3},
        "overrides": {"task.document": "@@.../file", "task.input": ".../y.jsonl"},
        "none": None,
        "number": 0.5,
    }


def test_log_lines(home: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PathHidingFormatter("[%(levelname)s] %(message)s"))
    logger = logging.Logger("test_log_lines")
    logger.addHandler(handler)
    logger.warning("cannot keep it in %s (%s)", home / ".cache", "/mnt/disk/x")
    assert stream.getvalue() == "[WARNING] cannot keep it in ~/.cache (.../x)\n"


@pytest.mark.parametrize("fails", [False, True])
def test_a_record(home: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    directory = save_checkpoint(home / "models" / "good")
    (home / "text.txt").write_text("A lamp stands on the pier. " * 8)
    session = Session(console=Console(file=io.StringIO()))
    task = {"name": "prompt", "document": f"@{home}/text.txt", "query": "What?", "max_new_tokens": 2}
    if fails:
        (directory / "config.json").write_text("{")
    values = {"model": {"path": str(directory), "device": "cpu"}, "method": {"hosts": 2}, "task": task}
    run_dir = home / "project" / "run"
    record = session.run(Job(values, run_dir, {"model.path": str(directory)}))
    assert (record["status"] == "failed") is fails
    text = (run_dir / "record.json").read_text()
    assert str(home) not in text and str(home.parent) not in text
    assert "~/models/good" in text and "@~/text.txt" in text
    assert str(directory) in str(record), "whoever started it is told in full"
