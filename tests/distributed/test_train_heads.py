"""Training heads under DeepSpeed: they learn, resume exactly after a kill, and serve an engine."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.launch_in_process import ROOT, _as_rank, run_infer
from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint
from tests.train_in_process import logged, run_training

TRAINING = "apb_ds.training.heads.train:train_heads"
SIZES = pytest.mark.parametrize("world_size", [1, 2])
HEADS = "heads/heads.safetensors"
KINDS = [{"kind": "single", "filler": "noise"}, {"kind": "multikey_words", "filler": "prose"}]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("training") / "model", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        lines = [f"Line {line} of text {number} says {line * number}." for line in range(200)]
        (folder / f"text{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def settings(model_path: Path, texts: Path, output: Path, **train: Any) -> dict[str, Any]:
    values = {
        "output": str(output),
        "hidden_size": 16,
        "steps": 6,
        "warmup_steps": 1,
        "tokens_per_step": 1000,
        "min_length": 500,
        "max_length": 700,
        "mixture": KINDS,
        "texts": [str(texts)],
        "quote_share": 0.0,
        "checkpoint_every": 2,
        "measure_every": 3,
        "held_out": 3,
        "log_every": 1,
        "workers": 0,
    }
    return {"model": {"path": str(model_path), "device": "cpu"}, "train": values | train, "seed": 3}


@SIZES
def test_a_killed_training_resumes_exactly(
    pool: Pools, model_path: Path, texts: Path, tmp_path: Path, world_size: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    records = pool(world_size).run(run_training, TRAINING, settings(model_path, texts, whole), timeout=120)
    assert not isinstance(records[0], str), records
    assert records[0]["steps"] == 6 and records[0]["ranks"] == world_size
    killed = pool(world_size).run(run_training, TRAINING, settings(model_path, texts, stopped), 5, timeout=120)
    assert killed == ["killed"] * world_size
    # A kill may cut off a line, which is not read.
    with open(stopped / "log.jsonl", "a") as stream:
        stream.write('{"step": 5, "held')
    (record, *_) = pool(world_size).run(run_training, TRAINING, settings(model_path, texts, stopped), timeout=120)
    assert record["resumed_after"] == 4
    assert logged(stopped) == logged(whole)
    assert [line["step"] for line in logged(whole)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    heads = [load_file(output / HEADS) for output in (whole, stopped)]
    assert heads[0].keys() == heads[1].keys() and len(heads[0]) == 6
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert [folder.name for folder in (stopped / "checkpoints").glob("step-*")] == ["step-6"]


def test_ranks_have_their_own_data_and_share_the_mean_gradient(
    pool: Pools, model_path: Path, texts: Path, tmp_path: Path
) -> None:
    """Two ranks take the same step as plain AdamW on the mean of their clipped gradients."""
    values = settings(model_path, texts, tmp_path / "out", steps=1, warmup_steps=0, weight_decay=0.0)
    pool(2).run(run_training, TRAINING, values, timeout=120)
    found = load_file(tmp_path / "out" / HEADS)
    expected = pool(1).run(step_by_hand, values, timeout=120)[0]
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(weight), rtol=0, atol=2e-5)  # steps are of 5e-4


def step_by_hand(rank: int, world_size: int, values: dict[str, Any]) -> dict[str, Any]:
    from apb_ds.config import from_mapping
    from apb_ds.loading import ModelConfig, load_model
    from apb_ds.training.batches import Batches, Lengths
    from apb_ds.training.heads.config import HeadsConfig
    from apb_ds.training.heads.module import HeadsLoss
    from apb_ds.training.heads.train import RetainingHeads, find_texts, head_sizes, make_data
    from apb_ds.training.mixture import Mixture

    config = from_mapping(HeadsConfig, values["train"], "train")
    loaded = load_model(from_mapping(ModelConfig, values["model"], "model"))
    heads = RetainingHeads.random(head_sizes(loaded.model), config.hidden_size, values["seed"])
    loss = HeadsLoss(loaded.model, heads, config, config.smoothing)
    data = make_data(config, Mixture(config.mixture), find_texts(config.texts), loaded.tokenizer)
    sums = [torch.zeros_like(weight) for weight in heads.parameters()]
    for data_rank in range(2):
        lengths = Lengths(config.min_length, config.max_length, config.growth)
        batch = Batches(data.training, lengths, 1, config.tokens_per_step, seed=values["seed"], rank=data_rank)[0]
        heads.zero_grad()
        loss(batch.input_ids, batch.is_marked, batch.num_document).mean().backward()
        for total, weight in zip(sums, heads.parameters(), strict=True):
            assert weight.grad is not None
            total += weight.grad.clamp(-config.clip, config.clip) / 2
    optimizer = torch.optim.AdamW(heads.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for total, weight in zip(sums, heads.parameters(), strict=True):
        weight.grad = total
    optimizer.step()
    return {name: weight.tolist() for name, weight in heads.published_state().items()}


def test_they_learn_and_serve_an_engine(pool: Pools, model_path: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    changes: dict[str, Any] = {"steps": 100, "warmup_steps": 10, "checkpoint_every": 100, "measure_every": 50}
    changes |= {"tokens_per_step": 600, "min_length": 400, "max_length": 600, "held_out": 4, "hidden_size": 32}
    values = settings(model_path, texts, output, **changes, observers="later", num_observers=24, learning_rate=2e-3)
    (record,) = pool(1).run(run_training, TRAINING, values, timeout=180)
    curve = record["curve"]
    assert [line["step"] for line in curve] == [0, 50, 100]
    assert curve[2]["loss"] < curve[1]["loss"] < curve[0]["loss"] and curve[2]["loss"] < 0.6 * curve[0]["loss"], curve
    assert curve[2]["overlap"] > curve[0]["overlap"] + 0.02, curve
    assert curve[2]["mass_random"] == curve[0]["mass_random"] < curve[2]["mass"] < curve[2]["mass_best"]
    card = (output / "heads" / "README.md").read_text()
    assert f"base_model: {model_path}" in card and "100 steps" in card and f"| 100 | {curve[2]['loss']:.4f} |" in card
    written = json.loads((output / "training.json").read_text())
    assert written["curve"] == curve and written["settings"]["train"]["mixture"] == KINDS
    overrides = [f"model.path={model_path}", "model.device=cpu", "method.compressor=retaining_heads", "method.hosts=4"]
    overrides += [f"method.retaining_heads={output}/heads", "task.num_tokens=400", f"hydra.run.dir={tmp_path}/run"]
    ended = run_infer(0, 1, [*overrides, "task.max_new_tokens=2"])
    assert ended.code == 0, ended.stderr


def test_half_precision(pool: Pools, model_path: Path, texts: Path, tmp_path: Path) -> None:
    values = settings(model_path, texts, tmp_path / "out", steps=4)
    values["model"]["dtype"] = "bfloat16"
    records = pool(2).run(run_training, TRAINING, values, timeout=120)
    assert not isinstance(records[0], str), records
    heads = load_file(tmp_path / "out" / HEADS)
    assert all(weight.dtype == torch.bfloat16 and bool(weight.isfinite().all()) for weight in heads.values())
    assert records[0]["curve"][-1]["loss"] < records[0]["curve"][0]["loss"]


@SIZES
def test_every_rank_reports_bad_settings(
    pool: Pools, model_path: Path, texts: Path, tmp_path: Path, world_size: int
) -> None:
    output = tmp_path / "x"
    cases = [
        (settings(model_path, texts, output, max_length=4096), "train.max_length=4096 is more than the 2048 positions"),
        (settings(model_path, texts / "nope", output), "train.texts"),
        (settings(model_path, texts, output, data=str(tmp_path / "nope.jsonl")), "train.data="),
        (settings(model_path, texts, output, mixture=[{"kind": "common_words"}], continue_share=0.0), "min_length"),
        (settings(tmp_path / "nowhere", texts, output), "nowhere"),
        (settings(model_path, texts, output, steps=0), "train.steps=0"),
        ({**settings(model_path, texts, output), "method": {}}, "config key='method'"),
        ({**settings(model_path, texts, output), "model": {"path": str(model_path), "dtype": "float16"}}, "bfloat16"),
    ]
    for values, message in cases:
        for error in pool(world_size).run(run_training, TRAINING, values, timeout=120):
            assert isinstance(error, str) and message in error, (message, error)
    assert not output.exists()


@SIZES
def test_the_output_directory_holds_one_training(
    pool: Pools, model_path: Path, texts: Path, tmp_path: Path, world_size: int
) -> None:
    output = tmp_path / "out"
    pool(world_size).run(run_training, TRAINING, settings(model_path, texts, output, steps=2), timeout=120)
    for error in pool(world_size).run(
        run_training, TRAINING, settings(model_path, texts, output, steps=2, label="weight"), timeout=120
    ):
        assert error.startswith("JobError") and "other settings (train.label)" in error
    again = settings(model_path, texts, output, steps=2, measure_every=1, log_every=2)
    assert [record["resumed_after"] for record in pool(world_size).run(run_training, TRAINING, again, timeout=120)] == [
        2
    ] * world_size


def launch(rank: int, world_size: int, arguments: list[str]) -> tuple[Any, str, str]:
    """Run launch/train_heads.py within the group that exists; return exit code, standard output and errors."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    script, common = importlib.import_module("launch.train_heads"), importlib.import_module("launch.common")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_rank(rank, world_size))
        stack.enter_context(mock.patch.dict(os.environ, {"LOCAL_RANK": str(rank)}))
        stack.enter_context(mock.patch.object(common, "FIRST_RANK_GRACE_S", 0))
        stack.enter_context(mock.patch.object(common, "leave_group", lambda: None))  # it is the pool's
        stack.enter_context(mock.patch.object(sys, "argv", ["train_heads.py", *arguments]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            code = script.main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@SIZES
def test_the_script(pool: Pools, model_path: Path, texts: Path, tmp_path: Path, world_size: int) -> None:
    changes = {
        "steps": 2,
        "warmup_steps": 0,
        "hidden_size": 8,
        "tokens_per_step": 800,
        "min_length": 800,
        "max_length": 800,
        "held_out": 1,
        "workers": 0,
        "output": tmp_path / "out",
        "texts": f"[{texts}]",
    }
    arguments = ["+exp=smollm2_heads", f"model.path={model_path}", "model.device=cpu", f"hydra.run.dir={tmp_path}/run"]
    arguments += [f"train.{name}={value}" for name, value in changes.items()]
    first, *others = pool(world_size).run(launch, arguments, timeout=180)
    assert first[0] == 0, first[2]
    assert f"Heads: {tmp_path}/out/heads (held out: loss " in first[1]
    assert all((code, out) == (0, "") for code, out, _ in others)
    assert (tmp_path / "out" / HEADS).is_file()
    command = (tmp_path / "out" / "heads" / "README.md").read_text().rpartition("`deepspeed ")[2]
    given = command.partition("`")[0]
    assert shlex.split(given) == ["launch/train_heads.py", *(item for item in arguments if "hydra." not in item)]
    first, *_ = pool(world_size).run(launch, [*arguments, "train.hidden_size=16"], timeout=180)
    assert first[0] == 2 and "Error: train.output=" in first[2] and "train.hidden_size" in first[2]
