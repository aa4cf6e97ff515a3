"""What all trainings share: settings read, an output directory that a stopped run goes on in, batches, a log."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from apb_ds.config import check_choice, check_integer
from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.parallel.groups import DEFAULT_TIMEOUT_S
from apb_ds.report.record import write_json
from apb_ds.session.job import MAX_SEED

SECTIONS = ("model", "train", "parallel", "seed", "debug")
LOG_NAME = "log.jsonl"
SETTINGS_NAME = "settings.json"
RECORD_NAME = "training.json"
# What a run may change when it goes on.
IRRELEVANT_KEYS = ("output", "overwrite", "checkpoint_every", "log_every", "workers", "fused")
MAX_WORKERS = 8
PREFETCHED = 8  # batches that a worker makes ahead

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Common:
    """The settings that every training has besides its own under ``train``."""

    model: ModelConfig
    seed: int
    timeout_s: float
    debug: bool


def read_common(values: Mapping[str, Any]) -> Common:
    """Validate what is not under ``train`` in a composed config.

    Raises
    ------
    ValueError
        For an unknown key or a value out of its range.
    """
    for key in values:
        check_choice("config key", key, SECTIONS)
    seed = values.get("seed") or 0
    check_integer("seed", seed, 0)
    if seed > MAX_SEED:
        raise ValueError(f"seed={seed} must be an integer of at most {MAX_SEED}.")
    return Common(
        model=ModelConfig.from_dict(dict(values.get("model") or {})),
        seed=seed,
        timeout_s=dict(values.get("parallel") or {}).get("timeout_s") or DEFAULT_TIMEOUT_S,
        debug=bool(values.get("debug")),
    )


def load_to_train(model_config: ModelConfig, max_length: int) -> LoadedModel:
    """Load the model that is trained, or for which something is.

    Raises
    ------
    ValueError
        If it has no tokenizer, or not the positions for conversations of `max_length` tokens.
    """
    loaded = load_model(model_config)
    if loaded.tokenizer is None or loaded.tokenizer.eos_token_id is None:
        raise ValueError("training needs a tokenizer with an end-of-sequence token; set model.tokenizer.")
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"train.max_length={max_length} is more than the {limit} positions of {loaded.source}; lower it."
        )
    return loaded


def open_output(config: Any, common: Common, irrelevant: Sequence[str] = IRRELEVANT_KEYS) -> None:
    """Make the output directory, or see that what is there is the same training, stopped.

    Parameters
    ----------
    config : dataclass with ``output`` and ``overwrite``
    irrelevant : its fields that may differ from those of the run before

    Raises
    ------
    ValueError
        If something else is there.
    """
    import shutil

    directory = Path(config.output).expanduser()
    train = {name: value for name, value in asdict(config).items() if name not in irrelevant}
    settings = json.loads(json.dumps({"train": train, "model": asdict(common.model), "seed": common.seed}))
    file = directory / SETTINGS_NAME
    if config.overwrite and file.is_file():
        shutil.rmtree(directory)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = _differing(before, settings)
        if differing:
            raise ValueError(
                f"train.output={config.output!r} holds a training with other settings ({', '.join(differing)}); name "
                "another directory, or set train.overwrite=true to start anew there."
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"train.output={config.output!r} holds something else than a training; name another one.")
    write_json(file, settings)


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the settings that two trainings do not share."""
    names = []
    for section in sorted(before.keys() | after.keys()):
        old, new = before.get(section), after.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{section}.{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        elif old != new:
            names.append(section)
    return names


def load_batches(batches: Dataset[Batch], first: int, steps: int, workers: int | None) -> DataLoader[Batch]:
    """Return the batches of steps `first` to `steps`, made ahead by processes of this rank.

    Parameters
    ----------
    workers : how many; None for as many as there are cores to spare
    """
    number = _num_workers() if workers is None else workers
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, steps),
        num_workers=number,
        prefetch_factor=PREFETCHED if number else None,
    )


def _num_workers() -> int:
    """Return how many processes may make documents beside this one."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(0, cores // max(1, local_ranks) - 1))


class TrainingLog:
    """The losses of the steps since the last line, over all kinds and for each; of this rank's batches.

    Parameters
    ----------
    path : of the JSONL file
    first : steps that are done; lines of later ones, which are done again, are dropped
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
            If a loss is no number.
        """
        by_kind = defaultdict(list)
        for kinds, losses in self._pairs:  # on the device until now: reading a loss waits for its step
            for kind, loss in zip(kinds, losses.tolist(), strict=True):
                by_kind[kind].append(loss)
        everything = [loss for losses in by_kind.values() for loss in losses]
        if not all(map(math.isfinite, everything)):
            raise RuntimeError(
                f"a loss of the steps up to {step} is no number; train anew with a lower train.learning_rate or more "
                "train.warmup_steps."
            )
        line = {
            "step": step,
            "loss": round(sum(everything) / len(everything), 5),
            "learning_rate": learning_rate,
            "tokens_per_s": round(self._num_tokens / (time.perf_counter() - self._began)),
            "by_kind": {kind: round(sum(losses) / len(losses), 5) for kind, losses in sorted(by_kind.items())},
        }
        self.append(line)
        logger.info("Step %d of %d: loss %.4f, %d tokens/s.", step, num_steps, line["loss"], line["tokens_per_s"])
        self._clear()

    def append(self, line: dict[str, Any]) -> None:
        """Write a line as it is; it has a ``step``."""
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _clear(self) -> None:
        self._pairs: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._num_tokens = 0
        self._began = time.perf_counter()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; none if it is not there. A line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
