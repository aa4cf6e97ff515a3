"""Training the instrument under DeepSpeed: it learns, resumes exactly after a kill, and its adapter loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint
from tests.train_in_process import logged, run_training

pytest.importorskip("peft")
TRAINING = "apb_ds.training.instrument:train_instrument"
SIZES = pytest.mark.parametrize("world_size", [1, 2])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("training") / "model", max_position_embeddings=2048)


def settings(model_path: Path, output: Path, **train: Any) -> dict[str, Any]:
    values = {
        "output": str(output),
        "steps": 6,
        "warmup_steps": 1,
        "tokens_per_step": 1400,
        "min_length": 700,
        "max_length": 800,
        "growth": 0.0,
        "learning_rate": 1e-2,
        "mixture": [{"kind": "single", "filler": "noise"}],
        "checkpoint_every": 2,
        "log_every": 1,
        "workers": 0,
    }
    return {"model": {"path": str(model_path), "device": "cpu"}, "train": values | train, "seed": 3}


@SIZES
def test_a_killed_training_resumes_exactly(pool: Pools, model_path: Path, tmp_path: Path, world_size: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    records = pool(world_size).run(run_training, TRAINING, settings(model_path, whole), timeout=120)
    assert not isinstance(records[0], str), records
    assert records[0]["steps"] == 6 and records[0]["ranks"] == world_size
    killed = pool(world_size).run(run_training, TRAINING, settings(model_path, stopped), 5, timeout=120)
    assert killed == ["killed"] * world_size
    assert [line["step"] for line in logged(stopped)] == [1, 2, 3, 4, 5]
    (record, *_) = pool(world_size).run(run_training, TRAINING, settings(model_path, stopped), timeout=120)
    assert record["resumed_after"] == 4
    assert logged(stopped) == logged(whole)
    adapters = [load_file(output / "adapter" / "adapter_model.safetensors") for output in (whole, stopped)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert [folder.name for folder in (stopped / "checkpoints").glob("step-*")] == ["step-6"]


def test_it_learns_and_its_adapter_loads(pool: Pools, model_path: Path, tmp_path: Path) -> None:
    from apb_ds.loading import ModelConfig, load_model

    output = tmp_path / "out"
    values = settings(model_path, output, steps=40, warmup_steps=4, checkpoint_every=100, max_length=700)
    (record,) = pool(1).run(run_training, TRAINING, values, timeout=180)
    losses = [line["loss"] for line in logged(output)]
    assert sum(losses[-5:]) / 5 < 0.75 * sum(losses[:5]) / 5, losses
    assert record["last_loss"] == pytest.approx(sum(losses[-10:]) / 10, abs=1e-3)
    card = (output / "adapter" / "README.md").read_text()
    assert f"base_model: {model_path}" in card and "40 steps of 1400 tokens" in card and "| lora_rank | 16 |" in card
    written = json.loads((output / "training.json").read_text())
    assert written["settings"]["train"]["mixture"] == values["train"]["mixture"] and written["versions"]["deepspeed"]
    loaded = load_model(ModelConfig(path=str(model_path), device="cpu", adapter=str(output / "adapter")))
    plain = load_model(ModelConfig(path=str(model_path), device="cpu"))
    ids = torch.arange(30).reshape(1, 30)
    assert not torch.allclose(loaded.model(ids).logits, plain.model(ids).logits, atol=1e-2)


@SIZES
def test_the_output_directory_holds_one_training(
    pool: Pools, model_path: Path, tmp_path: Path, world_size: int
) -> None:
    output = tmp_path / "out"
    pool(world_size).run(run_training, TRAINING, settings(model_path, output, steps=2, checkpoint_every=2), timeout=120)
    before = (output / "log.jsonl").read_text()
    other = settings(model_path, output, steps=2, checkpoint_every=1, learning_rate=1e-3)
    for error in pool(world_size).run(run_training, TRAINING, other, timeout=120):
        assert error.startswith("JobError") and "other settings (train.learning_rate)" in error
    assert (output / "log.jsonl").read_text() == before
    (record, *_) = pool(world_size).run(
        run_training, TRAINING, {**other, "train": {**other["train"], "overwrite": True}}, timeout=120
    )
    assert record["resumed_after"] == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for error in pool(world_size).run(
        run_training, TRAINING, settings(model_path, foreign, overwrite=True), timeout=120
    ):
        assert f"train.output={str(foreign)!r}" in error
    assert (foreign / "thesis.txt").read_text() == "years of work"


@SIZES
def test_every_rank_reports_bad_settings(pool: Pools, model_path: Path, tmp_path: Path, world_size: int) -> None:
    cases = [
        (
            settings(model_path, tmp_path / "x", max_length=4096),
            "train.max_length=4096 is more than the 2048 positions",
        ),
        (settings(model_path, tmp_path / "x", min_length=256), "no recipe for 256 tokens; raise train.min_length"),
        (settings(tmp_path / "nowhere", tmp_path / "x"), "nowhere"),
        (settings(model_path, tmp_path / "x", steps=0), "train.steps=0"),
        ({**settings(model_path, tmp_path / "x"), "method": {}}, "config key='method'"),
    ]
    for values, message in cases:
        for error in pool(world_size).run(run_training, TRAINING, values, timeout=120):
            assert message in error
    assert not (tmp_path / "x").exists()
