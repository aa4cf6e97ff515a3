"""Every task of launch/eval.py under the deepspeed launcher: two ranks, two samples, one launch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from apb_ds.tasks import TaskConfig
from apb_ds.tasks.base import _TASKS
from tests.harness_tasks import write_tasks
from tests.launcher.test_launch import Finished, run
from tests.launching import deepspeed_command
from tests.tiny_checkpoint import save_checkpoint

pytestmark = pytest.mark.launcher
for package in ("lm_eval", "rouge_score"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"missing: {package} (pip install -e '.[eval]')", allow_module_level=True)

NOISE = "The grass is green. The sky is blue. "


def task_files(place: Path) -> dict[str, dict[str, Any]]:
    """Return each task's settings for two samples, with the data that it reads written into `place`."""
    write_tasks(place / "harness")
    row = {"context": NOISE * 10, "input": "What is blue?", "answer": ["The sky"], "options": []}
    rows = [json.dumps({"id": number, **row}) + "\n" for number in range(2)]
    (place / "longbook_qa_eng.jsonl").write_text("".join(rows))
    for name in ("one", "two"):
        (place / f"{name}.txt").write_text(f"Text {name}. " + NOISE * 30)
    texts = [str(place / f"{name}.txt") for name in ("one", "two")]
    return {
        "passkey": {"num_tokens": 400, "depth": [0.0, 1.0], "max_new_tokens": 4},
        "synthetic": {"kind": "single", "num_tokens": 800, "num_samples": 2, "max_new_tokens": 4},
        "ruler": {"tasks": ["niah_single_1"], "length": 1500, "num_samples": 2, "max_new_tokens": 4},
        "infinitebench": {
            "tasks": ["longbook_qa_eng"],
            "data_dir": str(place),
            "num_samples": 2,
            "max_new_tokens": 4,
        },
        "fidelity": {"texts": texts, "num_tokens": 300, "judged_tokens": 20},
        "lm_eval": {"tasks": ["lamp_text"], "include_path": str(place / "harness"), "num_samples": 2},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("every_task")


@pytest.fixture(scope="module")
def finished(place: Path) -> Finished:
    save_checkpoint(place / "model", max_position_embeddings=4096)
    files = task_files(place)
    (place / "configs" / "task").mkdir(parents=True)
    for name, values in files.items():
        (place / "configs" / "task" / f"two_{name}.yaml").write_text(yaml.safe_dump({"name": name, **values}))
    arguments = [
        "-m",
        f"hydra.searchpath=[file://{place}/configs]",
        f"task={','.join(f'two_{name}' for name in files)}",
        f"model.path={place}/model",
        "method.hosts=4",
        f"eval.output={place}/results/${{task.name}}",
        f"hydra.sweep.dir={place}/sweep",
    ]
    return run([*deepspeed_command(), "launch/eval.py", *arguments], APB_DS_CACHE=str(place / "cache"))


def test_no_task_is_left_out(place: Path) -> None:
    scored = {name for name, config in _TASKS.items() if config.samples is not TaskConfig.samples}
    assert scored - {"prompt"} == set(task_files(place))


def test_all_went_well(finished: Finished) -> None:
    assert finished.code == 0, finished.output


@pytest.mark.parametrize("name", ["passkey", "synthetic", "ruler", "infinitebench", "fidelity", "lm_eval"])
def test_two_samples_each(finished: Finished, place: Path, name: str) -> None:
    assert finished.code == 0, finished.output
    folder = place / "results" / name
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and not any("error" in line for line in lines)
    assert all(line["seconds"] > 0 and not line["exact"] for line in lines)
    if name == "fidelity":
        assert all(0 < line["measures"]["kl"] < 10 for line in lines)
    else:
        assert all(0 <= line["score"] <= 1 and line["reference"] for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == name and summary["all"]["samples"] == 2
    assert f"results in {folder}" in finished.stdout
