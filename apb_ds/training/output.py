"""A training's output directory: the settings it belongs to, and the log of its steps."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apb_ds.report.record import write_json

LOG_NAME = "log.jsonl"
SETTINGS_NAME = "settings.json"
RECORD_NAME = "training.json"
# Fields of `train` that may change when a training resumes.
CHANGEABLE = ("output", "overwrite", "checkpoint_every", "log_every", "measure_every", "workers", "fused")

logger = logging.getLogger(__name__)


def open_output(directory: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Create the output directory, or check that it holds the same training, interrupted.

    Parameters
    ----------
    settings : sections by name, as in the record
    overwrite : whether a training that is there is removed first

    Raises
    ------
    ValueError
        If something else is there.
    """
    sections = json.loads(json.dumps(settings))
    for name in CHANGEABLE:
        sections["train"].pop(name, None)
    file = directory / SETTINGS_NAME
    if overwrite and file.is_file():
        shutil.rmtree(directory)
    if file.is_file():
        differing = _differing(json.loads(file.read_text(encoding="utf-8")), sections)
        if differing:
            raise ValueError(
                f"train.output={str(directory)!r} holds a training with other settings ({', '.join(differing)}); use "
                "another directory, or set train.overwrite=true to replace it."
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"train.output={str(directory)!r} holds files that are not a training's; use another one.")
    write_json(file, sections)


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the settings in which two trainings differ."""
    names = []
    for section in sorted(before.keys() | after.keys()):
        old, new = before.get(section), after.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{section}.{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        elif old != new:
            names.append(section)
    return names


class TrainingLog:
    """A JSONL file with the mean loss of this rank's batches since the last line, overall and by kind.

    Parameters
    ----------
    path : of the file
    first : number of completed steps; lines of later steps, which run again, are dropped
    """

    def __init__(self, path: Path, first: int) -> None:
        self._path = path
        lines = [line for line in read_lines(path) if line["step"] <= first]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._clear()

    def add(self, kinds: tuple[str, ...], num_tokens: int, losses: torch.Tensor) -> None:
        """Count a batch."""
        self._pairs.append((kinds, losses))
        self._num_tokens += num_tokens

    def write(self, step: int, num_steps: int, learning_rate: float) -> None:
        """Write a line about the batches since the last one.

        Raises
        ------
        RuntimeError
            If a loss is not finite.
        """
        by_kind = defaultdict(list)
        for kinds, losses in self._pairs:  # only now: reading a loss waits for its step on the device
            for kind, loss in zip(kinds, losses.tolist(), strict=True):
                by_kind[kind].append(loss)
        all_losses = [loss for losses in by_kind.values() for loss in losses]
        if not all(map(math.isfinite, all_losses)):
            raise RuntimeError(
                f"a loss before step {step} is not finite; lower train.learning_rate or raise train.warmup_steps, and "
                "start over."
            )
        line = {
            "step": step,
            "loss": _mean(all_losses),
            "learning_rate": learning_rate,
            "tokens_per_s": round(self._num_tokens / (time.perf_counter() - self._began)),
            "by_kind": {kind: _mean(losses) for kind, losses in sorted(by_kind.items())},
        }
        self.append(line)
        logger.info("Step %d of %d: loss %.4f, %d tokens/s.", step, num_steps, line["loss"], line["tokens_per_s"])
        self._clear()

    def append(self, line: dict[str, Any]) -> None:
        """Write a line unchanged; it has a ``step``."""
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _clear(self) -> None:
        self._pairs: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._num_tokens = 0
        self._began = time.perf_counter()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, [] if the file is missing. A line that a kill cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _mean(losses: list[float]) -> float:
    return round(sum(losses) / len(losses), 5)
