"""Unusual sessions: closed streams, narrow encodings, settings that Hydra itself refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.session import Session
from apb_ds.session.job import MAX_SEED, read_settings
from apb_ds.tasks.text import read_text
from tests.launch_in_process import INTERRUPTED, Ended, run_infer
from tests.tiny_checkpoint import save_checkpoint

DOCUMENT = "A lamp stands on the pier."
ROPE = {"rope_type": "default", "rope_theta": 30.0}
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
}


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


def test_a_sweep_over_positions_loads_its_model_once(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And answers as jobs do that load it themselves."""
    loads: list[ModelConfig] = []

    def load(config: ModelConfig, **given: Any) -> LoadedModel:
        loads.append(config)
        return load_model(config, **given)

    monkeypatch.setattr("apb_ds.session.model_in_use.load_model", load)
    asked = ("task=prompt", f"task.document='{DOCUMENT}'", "task.query=hi", "task.max_new_tokens=8")
    thetas = (10000.0, 2.0)
    rope = "+model.overrides.rope_parameters={rope_type: default, rope_theta: %s}"
    alone = [infer(model_path, tmp_path / str(theta), *asked, rope % theta) for theta in thetas]
    assert [ended.code for ended in alone] == [0, 0] and len(loads) == 2, alone[0].stderr
    answers = [ended.records[0]["task"]["prediction"] for ended in alone]
    assert len(set(answers)) > 1
    values = ",".join((rope % theta).partition("=")[2] for theta in thetas)
    swept = infer(model_path, tmp_path / "sweep", *asked, "-m", f"{rope.partition('=')[0]}={values}")
    assert [record["task"]["prediction"] for record in swept.records] == answers and len(loads) == 3


@pytest.mark.parametrize(
    ("path", "override", "field", "expected"),
    [
        ("/no/such/place", "model.geometry.num_hidden_layers=1", "num_hidden_layers", 1),
        (None, "model.geometry.rope_parameters.rope_theta=30.0", "rope_parameters", ROPE),
    ],
)
def test_a_geometry_holds_whether_or_not_the_files_are_there(
    model_path: Path, tmp_path: Path, path: str | None, override: str, field: str, expected: Any
) -> None:
    small = [f"model.geometry.{name}={value}" for name, value in SMALL.items() if name not in override]
    given = ["model.load_format=dummy", "task.num_tokens=300", *small, override]
    with mock.patch("apb_ds.session.model_in_use.load_model", side_effect=load_model) as loads:
        ended = infer(model_path, tmp_path, *given, *([f"model.path={path}"] if path else []))
    assert ended.code == 0, ended.stderr
    (call,) = loads.call_args_list
    model_config = load_model(call.args[0]).model.config
    assert getattr(model_config, field) == expected
    assert model_config.hidden_size == SMALL["hidden_size"]


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
