"""The loop that all trainings share, and what a training provides for it."""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.launcher import ranks_on_node
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.progress import steps_progress
from apb_ds.report.record import environment, write_json
from apb_ds.report.table import make_console
from apb_ds.training.batches import Batch, Batches, Source
from apb_ds.training.config import Settings
from apb_ds.training.output import LOG_NAME, RECORD_NAME, TrainingLog, read_lines
from apb_ds.training.trainer import Trainer

HELD_OUT_KEY = "held_out"
MAX_WORKERS = 8
PREFETCHED = 8  # batches that a worker makes in advance

logger = logging.getLogger(__name__)


class Training(ABC):
    """What is trained, on what, and what is saved of it.

    Parameters
    ----------
    settings : Settings
    loaded : LoadedModel
        The model that is trained, or that something is trained for.
    loss : nn.Module
        On the model's device; takes `inputs` and returns each conversation's loss.
    source : Source
        Generates the conversations.

    Attributes
    ----------
    folder : str
        Where in the output directory the trained weights go.
    measure_every : int or None
        Steps between measurements. None: the training measures nothing.
    """

    folder: ClassVar[str]
    measure_every: int | None = None

    def __init__(self, settings: Settings[Any], loaded: LoadedModel, loss: nn.Module, source: Source) -> None:
        self.settings = settings
        self.loaded = loaded
        self.loss = loss
        self.source = source

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return what the loss takes."""

    def measure(self, group: SequenceGroup) -> dict[str, Any]:
        """Measure on held-out conversations, all ranks together."""
        raise NotImplementedError

    @abstractmethod
    def write_weights(self, directory: Path, step: int) -> None:
        """Write what is trained; called on the first rank."""

    @abstractmethod
    def results(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the record says of this kind of training only; `lines` are the log's."""

    @abstractmethod
    def card(self, record: dict[str, Any]) -> str:
        """Return the model card, in Markdown."""


def run(training: Training, group: SequenceGroup) -> dict[str, Any]:
    """Train until the last step, from the newest checkpoint if there is one; return the record.

    All ranks call this together. The first one writes weights, card, record and log into the output directory.
    """
    config, directory, device = training.settings.train, training.settings.directory, training.loaded.device
    trainer = Trainer(training.loss, config, training.loaded.dtype, directory / "checkpoints")
    began, first = time.perf_counter(), trainer.resume()
    reset_peak_memory(device)
    if first:
        logger.info("Resuming after step %d.", first)
    log = TrainingLog(directory / LOG_NAME, first) if group.is_first else None
    if first == 0 and training.measure_every:
        _measure(training, group, 0, log)
    batches = Batches(
        training.source,
        config.lengths,
        config.steps,
        config.tokens_per_step,
        seed=training.settings.seed,
        rank=group.rank,
    )
    num_tokens = 0
    with steps_progress(make_console(to_stderr=True), config.steps, first, shown=group.is_first) as show:
        for batch in load_batches(batches, first, config.steps, config.workers):
            losses = trainer.train(*(tensor.to(device) for tensor in training.inputs(batch)))
            step, is_last = trainer.step, trainer.step == config.steps
            num_tokens += batch.num_tokens
            if log is not None:
                log.add(batch.kinds, batch.num_tokens, losses)
                if is_last or step % config.log_every == 0:
                    log.write(step, config.steps, trainer.learning_rate)
            if training.measure_every and (is_last or step % training.measure_every == 0):
                _measure(training, group, step, log)
            if is_last or step % config.checkpoint_every == 0:
                trainer.save(is_first=group.is_first)
                if group.is_first:
                    training.write_weights(directory / training.folder, step)
            if show is not None:
                show(step)
    record = _record(training, group, first, time.perf_counter() - began, num_tokens)
    if group.is_first:
        _finish(training, record)
    group.barrier()
    return record


def _measure(training: Training, group: SequenceGroup, step: int, log: TrainingLog | None) -> None:
    measured = training.measure(group)
    if log is not None:
        log.append({"step": step, HELD_OUT_KEY: measured})
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items() if isinstance(value, float))
        logger.info("Step %d, held out: %s.", step, numbers)


def _record(training: Training, group: SequenceGroup, first: int, seconds: float, num_tokens: int) -> dict[str, Any]:
    loaded, settings = training.loaded, training.settings
    lines = read_lines(settings.directory / LOG_NAME) if group.is_first else []
    return {
        "steps": settings.train.steps,
        "resumed_after": first,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(group.world_size * num_tokens / seconds) if seconds else None,
        "ranks": group.world_size,
        "peak_memory_bytes": peak_memory_bytes(loaded.device),
        **training.results(lines),
        "model": {"source": loaded.source, "dtype": str(loaded.dtype).removeprefix("torch.")},
        "settings": settings.recorded(),
        **environment(loaded.device),
    }


def _finish(training: Training, record: dict[str, Any]) -> None:
    directory = training.settings.directory
    weights = directory / training.folder
    training.write_weights(weights, record["steps"])  # again, for a run that was killed after its last checkpoint
    (weights / "README.md").write_text(training.card(record), encoding="utf-8")
    for folder in (directory, weights):  # the card refers to it
        write_json(folder / RECORD_NAME, record)


def load_to_train(model_config: ModelConfig, max_length: int) -> tuple[LoadedModel, Any]:
    """Load the model that is trained, or that something is trained for; return it and its tokenizer.

    Raises
    ------
    ValueError
        If it has no tokenizer, or too few positions for conversations of `max_length` tokens.
    """
    if model_config.shard_weights is True:  # auto shards nothing without a group
        raise ValueError("model.shard_weights=true is for inference; training needs whole weights on every rank.")
    loaded = load_model(model_config)
    if loaded.tokenizer is None or loaded.tokenizer.eos_token_id is None:
        raise ValueError("training needs a tokenizer with an end-of-sequence token; set model.tokenizer.")
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"train.max_length={max_length} is more than the {limit} positions of {loaded.source}; lower it."
        )
    return loaded, loaded.tokenizer


def load_batches(batches: Dataset[Batch], first: int, steps: int, workers: int | None) -> DataLoader[Batch]:
    """Return the batches of steps `first` to `steps`, made in advance by worker processes of this rank.

    Parameters
    ----------
    workers : number of processes; None for as many as there are spare cores
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
    """Return how many processes this rank may start next to itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(0, cores // ranks_on_node() - 1))
