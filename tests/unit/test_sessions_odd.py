"""Unusual sessions: closed streams, narrow encodings, settings that Hydra itself refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from apb_ds.session import Session
from apb_ds.session.job import MAX_SEED, read_settings
from apb_ds.tasks.text import read_text
from tests.launch_in_process import INTERRUPTED, Ended, run_infer
from tests.tiny_checkpoint import save_checkpoint

DOCUMENT = "A lamp stands on the pier."


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("odd") / "model")


def infer(model_path: Path, run_dir: Path, *overrides: str) -> Ended:
    arguments = [f"model.path={model_path}", "model.device=cpu", "method.hosts=2", "task.max_new_tokens=4"]
    return run_infer(0, 1, [*arguments, f"hydra.run.dir={run_dir}", f"hydra.sweep.dir={run_dir}", *overrides])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.query=What is ${HOME}?", ("Interpolation key 'HOME' not found", "task.query", r"\${")),
        ("model=5", ("must be a string",)),
        ("hydra.run.dir=/dev/null/run", ("run directory", "/dev/null", "hydra.run.dir")),
        (f"seed={MAX_SEED + 1}", (f"seed={MAX_SEED + 1}", f"at most {MAX_SEED}")),
    ],
)
def test_what_hydra_refuses_is_reported_without_a_traceback(
    model_path: Path, tmp_path: Path, override: str, expected: tuple[str, ...]
) -> None:
    ended = infer(model_path, tmp_path / "run", "task=prompt", f"task.document='{DOCUMENT}'", "task.query=hi", override)
    assert ended.code == 2
    assert "Traceback" not in ended.stderr
    assert all(part in ended.stderr for part in expected), ended.stderr


def test_a_dollar_brace_that_is_escaped_is_text(model_path: Path, tmp_path: Path) -> None:
    ended = infer(
        model_path, tmp_path / "run", "task=prompt", f"task.document='{DOCUMENT}'", r"task.query='What is \${HOME}?'"
    )
    assert ended.code == 0, ended.stderr
    assert ended.records[0]["config"]["task"]["query"] == "What is ${HOME}?"


def test_a_sweep_continues_after_a_text_that_cannot_be_resolved(model_path: Path, tmp_path: Path) -> None:
    ended = infer(
        model_path, tmp_path / "run", "-m", "task=prompt", f"task.document='{DOCUMENT}'", "task.query=${HOME},hi"
    )
    assert ended.code == 2
    first, second = ended.errors
    assert first is not None and "HOME" in first and second is None
    assert json.loads((tmp_path / "run" / "0" / "record.json").read_text())["error"] == first


def test_texts_of_a_sweep_arrive_as_typed(model_path: Path, tmp_path: Path) -> None:
    texts = ("-m", "task=prompt", "task.document=A lamp & a pier\\, #1!", "task.query=Où?,1.10", "task.stop=\\n")
    ended = infer(model_path, tmp_path / "run", *texts)
    assert ended.code == 0, ended.stderr
    asked = [record["config"]["task"] for record in ended.records]
    assert [record["overrides"]["task.query"] for record in ended.records] == ["Où?", "1.10"]
    assert [task["query"] for task in asked] == ["Où?", "1.10"]
    assert [(task["document"], task["stop"]) for task in asked] == [("A lamp & a pier, #1!", "\n")] * 2


def test_the_largest_seed_is_accepted() -> None:
    values = {"model": {"path": "m"}, "method": {"hosts": 2}, "task": {"name": "passkey"}, "seed": MAX_SEED}
    assert read_settings(values).seed == MAX_SEED


def test_a_closed_standard_input_has_no_questions() -> None:
    with mock.patch.object(sys, "stdin", None):
        assert list(Session().stdin) == []


def test_a_text_from_a_standard_input_that_is_closed() -> None:
    with (
        mock.patch.object(sys, "stdin", None),
        pytest.raises(ValueError, match=r"task\.query=-: standard input is clos"),
    ):
        read_text("task.query", "-")


def test_an_interrupt_is_reported_without_a_traceback(model_path: Path, tmp_path: Path) -> None:
    with mock.patch("apb_ds.session.question.prefill_progress", side_effect=KeyboardInterrupt):
        ended = infer(model_path, tmp_path / "run", "task=prompt", f"task.document='{DOCUMENT}'", "task.query=hi")
    assert ended.code == INTERRUPTED
    assert ended.stderr.endswith("Interrupted.\n") and "Traceback" not in ended.stderr
    assert "Ctrl-C" in json.loads((tmp_path / "run" / "record.json").read_text())["error"]


def test_an_answer_that_standard_output_cannot_show(model_path: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    narrow = io.TextIOWrapper(content, encoding="ascii")
    with (
        mock.patch("contextlib.redirect_stdout", lambda _: mock.patch.object(sys, "stdout", narrow)),
        mock.patch("apb_ds.session.active_job.ActiveJob.text_of", return_value="caf\u00e9"),
    ):
        ended = infer(model_path, tmp_path / "run", "task=prompt", f"task.document='{DOCUMENT}'", "task.query=hi")
    narrow.flush()
    assert ended.code == 0, ended.stderr
    assert b"Answer: caf\\xe9\n" in content.getvalue()


def test_a_batch_continues_after_a_query_that_the_template_refuses(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no such words') }}{% endif %}"
        "{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    )
    path = save_checkpoint(tmp_path / "model", template=template)
    queries = ("Where?", "bad", "When?")
    lines = [json.dumps({"id": query, "document": DOCUMENT, "query": query}) for query in queries]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    ended = infer(path, tmp_path / "run", "task=batch", f"task.input={tmp_path}/q.jsonl")
    results = [json.loads(line) for line in (tmp_path / "q.answers.jsonl").read_text().splitlines()]
    assert ended.code == 2
    assert ["answer" in result for result in results] == [True, False, True]
    assert "no such words" in results[1]["error"]
