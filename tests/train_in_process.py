"""Run a training inside a process of the pool, kill it after some steps, and read its log."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

KILLED = "killed"


def run_training(rank: int, world_size: int, place: str, values: dict[str, Any], stop_after: int | None = None) -> Any:
    """Train, or stop after `stop_after` steps as if killed. Return the record, or the error's text.

    Parameters
    ----------
    place : ``module:function`` that trains as a composed config says
    """
    from apb_ds.session.steps import JobError
    from apb_ds.training.trainer import Trainer

    module, name = place.split(":")
    training, step = getattr(importlib.import_module(module), name), Trainer.train

    def until(self: Trainer, *inputs: Any) -> Any:
        if self.step == stop_after:
            raise KeyboardInterrupt
        return step(self, *inputs)

    launched = mock.patch.dict(os.environ, {"LOCAL_RANK": str(rank)})  # as every launcher sets it
    with launched, mock.patch.object(Trainer, "train", until):
        try:
            return training(values)
        except KeyboardInterrupt:
            return KILLED
        except (JobError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def logged(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's log, without fields that differ from run to run."""
    kept = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in kept]
