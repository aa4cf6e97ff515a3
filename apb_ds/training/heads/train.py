"""Training retaining heads: the model stays as it is, and heads learn to foresee what its attention will want."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from apb_ds.compressors.retaining_heads import RetainingHeads, write_heads
from apb_ds.hf.architecture import check_supported
from apb_ds.hf.interface import check_projections
from apb_ds.loading import LoadedModel
from apb_ds.loading.heads import head_sizes
from apb_ds.parallel.groups import SequenceGroup, training_group
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.progress import steps_progress
from apb_ds.report.record import environment, write_json
from apb_ds.report.table import make_console
from apb_ds.session.steps import Steps
from apb_ds.training.batches import Lengths
from apb_ds.training.heads.card import write_card
from apb_ds.training.heads.config import HeadsConfig
from apb_ds.training.heads.examples import ExampleMaker, HeadBatch, HeadExample, HeadExamples, Sources
from apb_ds.training.heads.metrics import measure_all
from apb_ds.training.heads.module import HeadsLoss
from apb_ds.training.heads.sharegpt import ShareGPT
from apb_ds.training.heads.texts import find_texts, places_of, split_texts
from apb_ds.training.loop import Optimisation, Trainer
from apb_ds.training.mixture import Mixture
from apb_ds.training.run import (
    IRRELEVANT_KEYS,
    LOG_NAME,
    RECORD_NAME,
    Common,
    TrainingLog,
    load_batches,
    load_to_train,
    open_output,
    read_common,
    read_lines,
)

HEADS_FOLDER = "heads"
HEADS_NAME = "heads.safetensors"
HELD_OUT_KEY = "held_out"
DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger(__name__)


def train_heads(values: dict[str, Any], overrides: str = "") -> dict[str, Any]:
    """Train as a composed config says, all ranks together; go on where an earlier run was stopped.

    Parameters
    ----------
    overrides : the command line's arguments, for the card

    Returns
    -------
    dict
        The record, which is also in the output directory beside ``heads/``.

    Raises
    ------
    ValueError, RuntimeError
        For settings out of their range, on every rank, before the ranks meet.
    JobError
        If the output directory holds something else, the model cannot be loaded or heads are not for it, or there is
        nothing to train on.
    """
    common = read_common(values)
    config = HeadsConfig.from_dict(dict(values.get("train") or {}))
    mixture = Mixture(config.mixture)
    group = training_group(common.timeout_s)
    steps = Steps(group, debug=common.debug)
    loaded = steps.together(lambda: _load(common, config), local=True)
    files = steps.from_first(lambda: _check_sources(config))
    makers = steps.together(lambda: _makers(config, mixture, files, loaded), local=True)
    steps.from_first(lambda: open_output(config, common, (*IRRELEVANT_KEYS, "measure_every")))
    return _Run(config, makers, files, common, group, loaded).train(overrides)


class _Run:
    def __init__(
        self,
        config: HeadsConfig,
        makers: tuple[ExampleMaker, ExampleMaker],
        files: list[Path],
        common: Common,
        group: SequenceGroup,
        loaded: LoadedModel,
    ) -> None:
        self.config = config
        self.maker, self.held_out_maker = makers
        self.common = common
        self.group = group
        self.loaded = loaded
        self.files = files
        self.directory = Path(config.output).expanduser()
        heads = RetainingHeads.random(head_sizes(loaded.model), config.hidden_size, common.seed)
        self.loss = HeadsLoss(
            loaded.model, heads.to(loaded.device), config.label_kind, config.smoothing, config.observed_hosts
        )
        optimisation = Optimisation(
            config.steps,
            config.warmup_steps,
            config.learning_rate,
            config.weight_decay,
            config.clip,
            clips_values=True,
            schedule="linear",
        )
        self.trainer = Trainer(self.loss, optimisation, loaded.dtype, self.directory / "checkpoints")

    def train(self, overrides: str) -> dict[str, Any]:
        config = self.config
        began, first = time.perf_counter(), self.trainer.resume()
        reset_peak_memory(self.loaded.device)
        if first:
            logger.info("Going on after step %d.", first)
        log = TrainingLog(self.directory / LOG_NAME, first) if self.group.is_first else None
        held_out = self._held_out()
        if first == 0:
            self._measure(held_out, log)
        with steps_progress(make_console(to_stderr=True), config.steps, first, shown=self.group.is_first) as show:
            for batch in self._batches(first):
                losses = self.trainer.train(*self._on_device(batch))
                step = self.trainer.step
                if log is not None:
                    log.add(batch.kinds, batch.num_tokens, losses)
                    if step % config.log_every == 0 or step == config.steps:
                        log.write(step, config.steps, self.trainer.learning_rate)
                if step % config.measure_every == 0 or step == config.steps:
                    self._measure(held_out, log)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    self._save()
                if show is not None:
                    show(step)
        record = self._record(first, time.perf_counter() - began, overrides)
        if self.group.is_first:
            write_card(self.directory / HEADS_FOLDER, record, HEADS_NAME)
            for folder in (
                self.directory,
                self.directory / HEADS_FOLDER,
            ):  # their card points there
                write_json(folder / RECORD_NAME, record)
        self.group.barrier()
        return record

    def _batches(self, first: int) -> DataLoader[HeadBatch]:
        config, tokenizer = self.config, self.loaded.tokenizer
        batches = HeadExamples(
            self.maker,
            Lengths(config.min_length, config.max_length, config.growth),
            config.steps,
            config.tokens_per_step,
            tokenizer.eos_token_id,  # type: ignore[union-attr]
            seed=self.common.seed,
            rank=self.group.rank,
        )
        return load_batches(batches, first, config.steps, config.workers)

    def _held_out(self) -> list[HeadExample]:
        """Return the conversations to measure on, the same in every run: of the largest length, over other texts."""
        length, number = self.config.max_length, self.config.held_out
        return [self.held_out_maker.make(f"held out.{index}", length) for index in range(number)]

    def _on_device(self, batch: HeadBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = self.loaded.device
        return batch.input_ids.to(device), batch.is_observer.to(device), batch.num_document

    def _measure(self, held_out: list[HeadExample], log: TrainingLog | None) -> None:
        config = self.config
        measured = measure_all(
            self.loss,
            held_out,
            self.group,
            hosts=config.measured_hosts,
            ratio=config.measured_ratio,
            device=self.loaded.device,
        )
        if log is not None:
            step = self.trainer.step
            log.append({"step": step, HELD_OUT_KEY: measured})
            logger.info(
                "Step %d, held out: loss %.4f, overlap %.3f, attention mass kept %.3f (at random %.3f, at best %.3f).",
                step,
                *(measured[name] for name in ("loss", "overlap", "mass", "mass_random", "mass_best")),
            )

    def _save(self) -> None:
        """Write a checkpoint to go on from, and the heads as they are."""
        self.trainer.save(is_first=self.group.is_first)
        if self.group.is_first:
            step = str(self.trainer.step)
            write_heads(self.loss.heads, self.directory / HEADS_FOLDER / HEADS_NAME, {"step": step})

    def _record(self, first: int, seconds: float, overrides: str) -> dict[str, Any]:
        lines = read_lines(self.directory / LOG_NAME) if self.group.is_first else []
        curve = [{"step": line["step"], **line[HELD_OUT_KEY]} for line in lines if HELD_OUT_KEY in line]
        return {
            "steps": self.config.steps,
            "resumed_after": first,
            "seconds": round(seconds, 1),
            "ranks": self.group.world_size,
            "peak_memory_bytes": peak_memory_bytes(self.loaded.device),
            "parameters": sum(parameter.numel() for parameter in self.loss.heads.parameters()),
            "curve": curve,
            "texts": {"number": len(self.files), "places": places_of(self.files)},
            "overrides": overrides,
            "model": {"source": self.loaded.source, "dtype": str(self.loaded.dtype).removeprefix("torch.")},
            "settings": {
                "train": asdict(self.config),
                "seed": self.common.seed,
                "model": asdict(self.common.model),
            },
            **environment(self.loaded.device),
        }


def _load(common: Common, config: HeadsConfig) -> LoadedModel:
    loaded = load_to_train(common.model, config.max_length)
    if loaded.dtype not in DTYPES:
        raise ValueError(
            f"model.dtype={common.model.dtype!r}: heads are trained in bfloat16 or float32; set one of them."
        )
    check_supported(loaded.model)
    check_projections(loaded.model)
    head_sizes(loaded.model)
    return loaded


def _makers(
    config: HeadsConfig, mixture: Mixture, files: list[Path], loaded: LoadedModel
) -> tuple[ExampleMaker, ExampleMaker]:
    """Return what makes conversations to train on, and what makes those to measure on, from other texts.

    Raises
    ------
    ValueError
        If nothing can be made that is as short as is asked for.
    """
    data = None if config.data is None else ShareGPT(config.data)
    shares = config.text_share, config.quote_share, config.continue_share
    training, measuring = (
        ExampleMaker(
            Sources(mixture, texts, *shares, data, config.data_share),
            config.observing,
            loaded.tokenizer,
            held_out=held_out,
        )
        for texts, held_out in zip(split_texts(files), (False, True), strict=True)
    )
    training.make("check", config.min_length)
    return training, measuring


def _check_sources(config: HeadsConfig) -> list[Path]:
    """Return the texts to draw from, the same on every rank."""
    if config.data is not None:
        ShareGPT(config.data).check()
    uses_texts = config.text_share + config.quote_share + config.continue_share > 0
    if not uses_texts or (config.data is not None and config.data_share == 1):
        return []
    files = find_texts(config.texts)
    if not files:
        raise ValueError("train.texts: there is no text on this machine by default; name files or folders.")
    return files
