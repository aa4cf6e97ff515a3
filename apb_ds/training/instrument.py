"""The evaluation instrument: a small model that does long-document tasks well enough to show what a method loses."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from apb_ds.hf.architecture import decoder_layers
from apb_ds.loading import LoadedModel, ModelConfig
from apb_ds.ops.compiled import can_compile, compile_forwards
from apb_ds.parallel.groups import SequenceGroup, training_group
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.record import environment, write_json
from apb_ds.session.steps import Steps
from apb_ds.training.answer_loss import AnswerLoss
from apb_ds.training.batches import Batch, Batches, Lengths
from apb_ds.training.card import write_card
from apb_ds.training.config import InstrumentConfig
from apb_ds.training.loop import Optimisation, Trainer
from apb_ds.training.mixture import Mixture
from apb_ds.training.run import (
    LOG_NAME,
    RECORD_NAME,
    TrainingLog,
    load_batches,
    load_to_train,
    open_output,
    read_common,
    read_lines,
)

ADAPTER_NAME = "adapter"

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
    common = read_common(values)
    config = InstrumentConfig.from_dict(dict(values.get("train") or {}))
    mixture = Mixture(config.mixture)
    group = training_group(common.timeout_s)
    steps = Steps(group, debug=common.debug)
    loaded = steps.together(lambda: _load(common.model, config, mixture), local=True)
    steps.from_first(lambda: open_output(config, common))
    return _Run(config, mixture, common.model, common.seed, group, loaded).train()


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
        if config.fused and loaded.device.type == "cuda" and can_compile(loaded.device):
            compile_forwards(decoder_layers(self.adapted.get_base_model()))
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
        log = TrainingLog(self.directory / LOG_NAME, first) if self.group.is_first else None
        num_tokens = 0
        for batch in self._batches(first):
            losses = self.trainer.train(*self._on_device(batch))
            num_tokens += batch.num_tokens
            if log is not None:
                log.add(batch.kinds, batch.num_tokens, losses)
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
        batches = _make_batches(config, self.mixture, self.loaded, self.seed, self.group.rank)
        return load_batches(batches, first, config.steps, config.workers)

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.loaded.device
        return batch.input_ids.to(device), batch.is_answer.to(device)

    def _record(self, first: int, seconds: float, num_tokens: int) -> dict[str, Any]:
        losses = [line["loss"] for line in read_lines(self.directory / LOG_NAME)[-10:]] if self.group.is_first else []
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
        for folder in (self.directory, directory):  # with the adapter too, for its card points there
            write_json(folder / RECORD_NAME, record)


def _make_batches(config: InstrumentConfig, mixture: Mixture, loaded: LoadedModel, seed: int, rank: int) -> Batches:
    lengths = Lengths(config.min_length, config.max_length, config.growth, config.at_longest)
    return Batches(
        mixture,
        lengths,
        loaded.tokenizer,
        config.steps,
        config.tokens_per_step,
        seed=seed,
        rank=rank,
        asked_first=config.asked_first,
    )


def _load(model_config: ModelConfig, config: InstrumentConfig, mixture: Mixture) -> LoadedModel:
    loaded = load_to_train(model_config, config.max_length)
    assert loaded.tokenizer is not None
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
