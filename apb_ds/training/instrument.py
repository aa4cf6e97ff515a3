"""The evaluation instrument: a small model that does long-document tasks well enough to show what a method loses."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from apb_ds.config import check_choice, check_integer
from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.parallel.groups import DEFAULT_TIMEOUT_S, SequenceGroup, training_group
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.record import environment, write_json
from apb_ds.session.job import MAX_SEED
from apb_ds.session.steps import Steps
from apb_ds.training.answer_loss import AnswerLoss
from apb_ds.training.batches import Batch, Batches, Lengths
from apb_ds.training.card import write_card
from apb_ds.training.config import InstrumentConfig
from apb_ds.training.loop import Optimisation, Trainer
from apb_ds.training.mixture import Mixture

SECTIONS = ("model", "train", "parallel", "seed", "debug")
ADAPTER_NAME = "adapter"
LOG_NAME = "log.jsonl"
SETTINGS_NAME = "settings.json"
RECORD_NAME = "training.json"
# What a run may change when it goes on.
IRRELEVANT_KEYS = ("output", "overwrite", "checkpoint_every", "log_every", "workers")
MAX_WORKERS = 8
PREFETCHED = 8  # batches that a worker makes ahead

logger = logging.getLogger(__name__)


def train_instrument(values: dict[str, Any]) -> dict[str, Any]:
    """Train as a composed config says, all ranks together; go on where an earlier run was stopped.

    Returns
    -------
    dict
        The record, which is also in the output directory beside ``adapter/``.

    Raises
    ------
    ValueError, RuntimeError
        For settings out of their range, on every rank, before the ranks meet.
    JobError
        If the output directory holds something else, or the model cannot be loaded.
    """
    for key in values:
        check_choice("config key", key, SECTIONS)
    config = InstrumentConfig.from_dict(dict(values.get("train") or {}))
    mixture = Mixture(config.mixture)
    model_config = ModelConfig.from_dict(dict(values.get("model") or {}))
    seed = values.get("seed") or 0
    check_integer("seed", seed, 0)
    if seed > MAX_SEED:
        raise ValueError(f"seed={seed} must be an integer of at most {MAX_SEED}.")
    timeout_s = dict(values.get("parallel") or {}).get("timeout_s") or DEFAULT_TIMEOUT_S
    group = training_group(timeout_s)
    steps = Steps(group, debug=bool(values.get("debug")))
    loaded = steps.together(lambda: _load(model_config, config, mixture), local=True)
    steps.from_first(lambda: _open_output(config, model_config, seed))
    return _Run(config, mixture, model_config, seed, group, loaded).train()


class _Run:
    def __init__(
        self,
        config: InstrumentConfig,
        mixture: Mixture,
        model_config: ModelConfig,
        seed: int,
        group: SequenceGroup,
        loaded: LoadedModel,
    ) -> None:
        self.config = config
        self.mixture = mixture
        self.model_config = model_config
        self.seed = seed
        self.group = group
        self.loaded = loaded
        self.directory = Path(config.output).expanduser()
        self.adapted = _adapted(loaded.model, config, model_config, seed)
        optimisation = Optimisation(
            config.steps, config.warmup_steps, config.learning_rate, config.weight_decay, config.clip
        )
        # The ranks' shares of a global rank's data: `SequenceGroup` counts places in a group, which here is all ranks.
        self.trainer = Trainer(AnswerLoss(self.adapted), optimisation, loaded.dtype, self.directory / "checkpoints")

    def train(self) -> dict[str, Any]:
        began, first = time.perf_counter(), self.trainer.resume()
        reset_peak_memory(self.loaded.device)
        if first:
            logger.info("Going on after step %d.", first)
        log = _Log(self.directory / LOG_NAME, first) if self.group.is_first else None
        num_tokens = 0
        for batch in self._batches(first):
            losses = self.trainer.train(*self._on_device(batch))
            num_tokens += batch.num_tokens
            if log is not None:
                log.add(batch, losses)
            step = self.trainer.step
            if log is not None and (step % self.config.log_every == 0 or step == self.config.steps):
                log.write(step, self.config.steps, self.trainer.learning_rate)
            if step % self.config.checkpoint_every == 0 or step == self.config.steps:
                self.trainer.save(is_first=self.group.is_first)
        seconds = time.perf_counter() - began
        record = self._record(first, seconds, num_tokens)
        if self.group.is_first:
            self._save(record)
        self.group.barrier()
        return record

    def _batches(self, first: int) -> DataLoader[Batch]:
        config = self.config
        workers = _num_workers() if config.workers is None else config.workers
        return DataLoader(
            _make_batches(config, self.mixture, self.loaded, self.seed, self.group.rank),
            batch_size=None,
            sampler=range(first, config.steps),
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
        )

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.loaded.device
        return batch.input_ids.to(device), batch.is_answer.to(device)

    def _record(self, first: int, seconds: float, num_tokens: int) -> dict[str, Any]:
        losses = [line["loss"] for line in _read_lines(self.directory / LOG_NAME)[-10:]] if self.group.is_first else []
        return {
            "steps": self.config.steps,
            "resumed_after": first,
            "seconds": round(seconds, 1),
            "tokens_per_s": round(self.group.world_size * num_tokens / seconds) if seconds else None,
            "ranks": self.group.world_size,
            "peak_memory_bytes": peak_memory_bytes(self.loaded.device),
            "last_loss": round(sum(losses) / len(losses), 4) if losses else None,
            "model": {"source": self.loaded.source, "dtype": str(self.loaded.dtype).removeprefix("torch.")},
            "settings": {"train": asdict(self.config), "seed": self.seed, "model": asdict(self.model_config)},
            **environment(self.loaded.device),
        }

    def _save(self, record: dict[str, Any]) -> None:
        directory = self.directory / ADAPTER_NAME
        self.adapted.save_pretrained(str(directory))
        write_card(directory, record)
        write_json(self.directory / RECORD_NAME, record)


class _Log:
    """The losses of the steps since the last line, over all kinds and for each; of this rank's batches."""

    def __init__(self, path: Path, first: int) -> None:
        self._path = path
        lines = [line for line in _read_lines(path) if line["step"] <= first]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._clear()

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        self._pairs.append((batch.kinds, losses))
        self._num_tokens += batch.num_tokens

    def write(self, step: int, num_steps: int, learning_rate: float) -> None:
        by_kind = defaultdict(list)
        for kinds, losses in self._pairs:  # on the device until now: reading a loss waits for its step
            for kind, loss in zip(kinds, losses.tolist(), strict=True):
                by_kind[kind].append(loss)
        everything = [loss for losses in by_kind.values() for loss in losses]
        line = {
            "step": step,
            "loss": round(sum(everything) / len(everything), 5),
            "learning_rate": learning_rate,
            "tokens_per_s": round(self._num_tokens / (time.perf_counter() - self._began)),
            "by_kind": {kind: round(sum(losses) / len(losses), 5) for kind, losses in sorted(by_kind.items())},
        }
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        logger.info("Step %d of %d: loss %.4f, %d tokens/s.", step, num_steps, line["loss"], line["tokens_per_s"])
        self._clear()

    def _clear(self) -> None:
        self._pairs: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._num_tokens = 0
        self._began = time.perf_counter()


def _make_batches(config: InstrumentConfig, mixture: Mixture, loaded: LoadedModel, seed: int, rank: int) -> Batches:
    lengths = Lengths(config.min_length, config.max_length, config.growth)
    return Batches(mixture, lengths, loaded.tokenizer, config.steps, config.tokens_per_step, seed=seed, rank=rank)


def _load(model_config: ModelConfig, config: InstrumentConfig, mixture: Mixture) -> LoadedModel:
    loaded = load_model(model_config)
    if loaded.tokenizer is None or loaded.tokenizer.eos_token_id is None:
        raise ValueError("training needs a tokenizer with an end-of-sequence token; set model.tokenizer.")
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ValueError(
            f"train.max_length={config.max_length} is more than the {limit} positions of {loaded.source}; lower it."
        )
    ends = loaded.model.generation_config.eos_token_id
    if loaded.tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"{loaded.source} stops at token {ends}, and its tokenizer calls {loaded.tokenizer.eos_token_id} the end: "
            "answers would be trained to go on for ever; set model.tokenizer to one that fits."
        )
    _make_batches(config, mixture, loaded, 0, 0).check()
    return loaded


def _adapted(model: Any, config: InstrumentConfig, model_config: ModelConfig, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = model_config.path  # not where it lies on this machine
    return adapted.train()


def _open_output(config: InstrumentConfig, model_config: ModelConfig, seed: int) -> None:
    """Make the output directory, or see that what is there is the same training, stopped."""
    import shutil

    directory = Path(config.output).expanduser()
    train = {name: value for name, value in asdict(config).items() if name not in IRRELEVANT_KEYS}
    settings = json.loads(json.dumps({"train": train, "model": asdict(model_config), "seed": seed}))
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


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _num_workers() -> int:
    """Return how many processes may make documents beside this one."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(0, cores // max(1, local_ranks) - 1))
