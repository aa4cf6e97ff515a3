"""The examples for launchers and frameworks, as their docstrings say, on the ranks that these would have started."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import apb_ds
from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTIONS = ("What colour is the sky?", "And the grass?")


def run_script(rank: int, world_size: int, name: str, arguments: list[str]) -> str:
    """Run an example as one of the ranks of a group that exists; return what it printed."""
    script = str(EXAMPLES / name)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    environment = {variable: str(value) for variable, value in told.items()} | {"ACCELERATE_USE_CPU": "true"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch("sys.argv", [script, *arguments]),
        mock.patch("torch.distributed.init_process_group"),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            if name == "accelerate_script.py":
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state(reset_partial_state=True)
    said = printed.getvalue()
    return said[said.index("Answer") :] if "Answer" in said else ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("scripts"))
    (folder / "text.txt").write_text("The grass is green. The sky is blue. " * 8, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[str]:
    """What the scripts print for each question, by an engine of this process."""
    return [f"Answer: {answer}\n" for answer in answers_of(folder, None)]


def answers_of(folder: Path, model: Any) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=8))
    parts = [(folder / "text.txt").read_text(), *(f"\n\n{question}\n" for question in QUESTIONS)]
    document, *queries = (tokenizer(part, return_tensors="pt").input_ids for part in parts)
    assert not engine.prefill(document, queries[0]).plan.exact
    greedy: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    return [tokenizer.decode(engine.generate(document, query, **greedy)[0]) for query in queries]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*_script.py")) + sorted(EXAMPLES.glob("*/*.py")))
def test_they_are_short(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 or script.name == "deepspeed_script.py"  # which makes a model and a text of its own


@pytest.mark.parametrize("name", ["torchrun", "accelerate", "tensor_parallel"])
def test_two_ranks_share_a_request(pool: Pools, folder: Path, answers: list[str], name: str) -> None:
    arguments = [str(folder), str(folder / "text.txt"), QUESTIONS[0]]
    assert pool(2).run(run_script, f"{name}_script.py", arguments) == [answers[0], ""]


def test_a_grid_of_data_and_sequence_ranks(pool: Pools, folder: Path, answers: list[str]) -> None:
    arguments = ["2", "1", str(folder), str(folder / "text.txt"), *QUESTIONS]
    assert pool(4).run(run_script, "mpu_script.py", arguments) == [answers[0], "", answers[1], ""]
    assert answers[0] != answers[1]


def test_a_grid_of_sequence_and_tensor_ranks(pool: Pools, folder: Path, answers: list[str]) -> None:
    """Tensor ranks have copies, and the sequence ranks are those that are two apart."""
    arguments = ["--local_rank=0", "1", "2", str(folder), str(folder / "text.txt"), QUESTIONS[0]]
    assert pool(4).run(run_script, "mpu_script.py", arguments) == [answers[0], "", "", ""]


def test_two_adapters(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    from transformers import AutoModelForCausalLM

    expected = {}
    torch.manual_seed(0)
    for name in ("one", "other"):
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
        adapted.save_pretrained(tmp_path / name)
        expected[name] = answers_of(folder, adapted.merge_and_unload())[0]
    assert expected["one"] != expected["other"]
    arguments = [str(folder), str(tmp_path / "one"), str(tmp_path / "other"), str(folder / "text.txt"), QUESTIONS[0]]
    printed = run_script(0, 1, "peft_script.py", arguments)
    assert printed == "".join(f"Answer of {name}: {expected[name]}\n" for name in ("one", "other", "one"))
