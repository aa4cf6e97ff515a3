"""Checkpoints of a training: resuming from them, and reading them as data only."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.pool import Pools
from tests.unit.test_pickles import Touch


class Squares(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4).to(dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs).float().pow(2).mean(dim=1)


def train_and_resume(rank: int, world_size: int, directory: Path, sign: Path, dtype: torch.dtype) -> list[Any]:
    """Resume a run, then one whose checkpoint was changed; return what happened."""
    training = importlib.import_module("apb_ds.training.trainer")
    with mock.patch.dict(os.environ, {"LOCAL_RANK": str(rank)}):
        return _train_and_resume(training, rank, directory, sign, dtype)


def _train_and_resume(training: Any, rank: int, directory: Path, sign: Path, dtype: torch.dtype) -> list[Any]:
    plan = training.TrainingConfig(output="x", steps=9, warmup_steps=2, learning_rate=1e-2, weight_decay=0.1, clip=1.0)
    trainer = training.Trainer(Squares(dtype), plan, dtype, directory)
    found = [trainer.resume()]
    for step in range(3):
        trainer.train(torch.full((2, 4), 1.0 + step).to(dtype))
    trainer.save(is_first=rank == 0)
    resumed = training.Trainer(module := Squares(dtype), plan, dtype, directory)
    found.append(resumed.resume())
    again = [float(engine.train(torch.ones(2, 4).to(dtype)).sum()) for engine in (trainer, resumed)]
    found += [abs(again[0] - again[1]) < 1e-6, next(module.parameters()).dtype == dtype]
    torch.distributed.barrier()
    for file in directory.rglob(f"*_rank_{rank}_*optim_states.pt"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "x": Touch(sign)}, file)
    torch.distributed.barrier()
    try:
        training.Trainer(Squares(dtype), plan, dtype, directory).resume()
    except Exception as error:
        found.append(type(error).__name__)
    return [*found, sign.exists(), training.WEIGHTS_ONLY in os.environ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_of_training(pool: Pools, tmp_path: Path, dtype: torch.dtype) -> None:
    sign = tmp_path / "code was run"
    found = pool(2).run(train_and_resume, tmp_path / "run", sign, dtype, timeout=120)
    assert found == [[0, 3, True, True, "UnpicklingError", False, False]] * 2


def train_to_nothing(rank: int, world_size: int, directory: Path, dtype: torch.dtype, factor: float) -> list[Any]:
    """Save after a step whose gradient is not finite; return whether losses and weights are finite, and the message."""
    training = importlib.import_module("apb_ds.training.trainer")
    plan = training.TrainingConfig(output="x", steps=9, warmup_steps=2, learning_rate=1e-2, weight_decay=0.1, clip=1.0)
    with mock.patch.dict(os.environ, {"LOCAL_RANK": str(rank)}):
        trainer = training.Trainer(module := Squares(dtype), plan, dtype, directory)
        trainer.train(torch.ones(2, 4).to(dtype))
        trainer.save(is_first=rank == 0)
        if rank == world_size - 1:  # one rank is enough
            module.linear.weight.register_hook(lambda gradient: gradient * factor)
        losses = trainer.train(torch.ones(2, 4).to(dtype))
        try:
            trainer.save(is_first=rank == 0)
            said = "saved"
        except RuntimeError as error:
            said = str(error)
    are_numbers = all(bool(weight.isfinite().all()) for weight in module.parameters())
    return [bool(losses.isfinite().all()), are_numbers, said]


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_not_saved(pool: Pools, tmp_path: Path, factor: float) -> None:
    found = pool(2).run(train_to_nothing, tmp_path / "run", torch.bfloat16, factor, timeout=120)
    assert found == [[True, False, "the gradient of step 2 is not finite; the previous checkpoint is kept."]] * 2
    assert [folder.name for folder in (tmp_path / "run").glob("step-*")] == ["step-1"]


def test_a_skipped_step_does_not_stop_the_training(pool: Pools, tmp_path: Path) -> None:
    """In float32 and float16, DeepSpeed skips steps whose gradient is not finite."""
    found = pool(2).run(train_to_nothing, tmp_path / "run", torch.float32, float("inf"), timeout=120)
    assert found == [[True, True, "saved"]] * 2
    assert [folder.name for folder in (tmp_path / "run").glob("step-*")] == ["step-2"]
