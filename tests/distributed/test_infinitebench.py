"""task=infinitebench through launch/eval.py: scores by task, truncated documents, missing files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch_in_process import Ended, run_infer
from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint

SIZES = pytest.mark.parametrize("world_size", [1, 2])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("infinitebench") / "model")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of two rows each, one of which has a document longer than the model's positions."""
    folder = tmp_path_factory.mktemp("data")
    noise = "The grass is green. The sky is blue. "
    rows: dict[str, list[dict[str, Any]]] = {
        "passkey": [
            {"id": 8, "context": noise * 10, "input": "What is the pass key?", "answer": ["12345"], "options": []},
            {"id": 9, "context": noise * 90, "input": "What is the pass key?", "answer": ["54321"], "options": []},
        ],
        "longbook_qa_eng": [
            {"id": number, "context": noise * 10, "input": "What is blue?", "answer": ["The sky"], "options": []}
            for number in range(2)
        ],
    }
    for task, lines in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(pool: Pools, world_size: int, model_path: Path, output: Path, *overrides: str) -> list[Ended]:
    arguments = [
        f"model.path={model_path}",
        "model.device=cpu",
        "+model.overrides.max_position_embeddings=1500",
        "task=infinitebench",
        "method.hosts=2",
        f"eval.output={output}",
        f"hydra.run.dir={output.parent}/run",
        *overrides,
    ]
    return pool(world_size).run(run_infer, arguments, "", (), "eval", timeout=120)


@SIZES
def test_an_evaluation(pool: Pools, model_path: Path, data_dir: Path, tmp_path: Path, world_size: int) -> None:
    output = tmp_path / "out"
    tasks = "task.tasks=[passkey,longbook_qa_eng]"
    ended = evaluate(pool, world_size, model_path, output, tasks, f"task.data_dir={data_dir}", "task.num_samples=2")
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    found = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(one["labels"]["task"], one["labels"]["truncated"], one["row_id"]) for one in found] == [
        ("passkey", False, 8),
        ("passkey", True, 9),
        ("longbook_qa_eng", False, 0),
        ("longbook_qa_eng", False, 1),
    ]
    assert [one["reference"] for one in found] == [["12345"], ["54321"], ["The sky"], ["The sky"]]
    # As long as the model's positions allow, less one if they cannot be halved.
    assert found[1]["document_tokens"] + found[1]["query_tokens"] + 6 in (1499, 1500)
    assert found[1]["whole_document_tokens"] > 1500
    assert [one["new_tokens"] <= budget for one, budget in zip(found, (6, 6, 40, 40), strict=True)] == [True] * 4
    cells = json.loads((output / "summary.json").read_text())["cells"]
    assert [(cell["labels"], cell["samples"], cell["failed"]) for cell in cells] == [
        ({"task": "passkey", "truncated": False}, 1, 0),
        ({"task": "passkey", "truncated": True}, 1, 0),
        ({"task": "longbook_qa_eng", "truncated": False}, 2, 0),
    ]
    assert "truncated" in ended[0].stdout


@SIZES
def test_a_missing_file(pool: Pools, model_path: Path, data_dir: Path, tmp_path: Path, world_size: int) -> None:
    overrides = ("task.tasks=[passkey,code_run]", f"task.data_dir={data_dir}")
    ended = evaluate(pool, world_size, model_path, tmp_path / "out", *overrides)
    assert [rank.code for rank in ended] == [2] * world_size
    assert f"{data_dir}/code_run.jsonl" in ended[0].stderr
