"""Train a small model to solve long-document tasks, so that an evaluation shows what an attention method loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb_ds.hf.architecture import decoder_layers
from apb_ds.loading import LoadedModel
from apb_ds.ops.compiled import can_compile, compile_forwards
from apb_ds.parallel.failure.ending import Watch
from apb_ds.parallel.groups import training_group
from apb_ds.session.steps import Steps
from apb_ds.training.answer_loss import AnswerLoss
from apb_ds.training.batches import Batch
from apb_ds.training.card import make_card
from apb_ds.training.config import InstrumentConfig, Settings, read_settings
from apb_ds.training.conversations import GeneratedConversations
from apb_ds.training.loop import Training, load_to_train, run
from apb_ds.training.mixture import Mixture
from apb_ds.training.output import open_output

NUM_LAST_LINES = 10  # of the log, whose mean is the last loss
ABOUT = """\
A LoRA with which `{base}` finds, tracks and counts things in generated documents. The plain model fails most such tasks
even with exact attention, so it cannot show what an approximation loses. This one is not a chat model, knows nothing
that the base model does not know, and answers other questions worse. Documents and questions come from the generator of
`task=synthetic`, split `train`, which shares no word, sentence or choice with the split used for evaluation. The loss
covers the answers only, with dense attention.

Load it merged into the base model's weights, with `model.adapter=<this directory>`.\
"""


def train_instrument(values: dict[str, Any], watch: Watch | None = None) -> dict[str, Any]:
    """Train as a composed config says, all ranks together; resume where an earlier run was interrupted.

    Parameters
    ----------
    watch : the process's, which follows the group

    Returns
    -------
    dict
        The record, which is also in the output directory next to ``adapter/``.

    Raises
    ------
    ValueError, RuntimeError
        For settings out of their range, on every rank, before the ranks meet.
    JobError
        If the output directory holds something else, or the model cannot be loaded.
    """
    settings = read_settings(InstrumentConfig, values)
    mixture = Mixture(settings.train.mixture)
    group = training_group(settings.timeout_s, watch)
    steps = Steps(group, debug=settings.debug)
    loaded, source = steps.together(lambda: _load(settings, mixture), local=True)
    steps.from_first(lambda: open_output(settings.directory, settings.recorded(), overwrite=settings.train.overwrite))
    return run(Instrument(settings, loaded, source), group)


class Instrument(Training):
    """A LoRA on all linear layers of the model, trained on the answers."""

    folder = "adapter"

    def __init__(
        self, settings: Settings[InstrumentConfig], loaded: LoadedModel, source: GeneratedConversations
    ) -> None:
        self.adapted = _adapted(loaded.model, settings)
        if settings.train.fused and loaded.device.type == "cuda" and can_compile(loaded.device):
            compile_forwards(decoder_layers(self.adapted.get_base_model()))
        super().__init__(settings, loaded, AnswerLoss(self.adapted), source)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.input_ids, batch.is_marked

    def write_weights(self, directory: Path, step: int) -> None:
        self.adapted.save_pretrained(str(directory))

    def results(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        losses = [line["loss"] for line in lines[-NUM_LAST_LINES:]]
        return {"last_loss": round(sum(losses) / len(losses), 4) if losses else None}

    def card(self, record: dict[str, Any]) -> str:
        return make_card(
            record,
            "peft",
            "[evaluation, long-context, lora]",
            title="A model for evaluating long-context attention",
            about=ABOUT.format(base=self.settings.model.path),
            result=f"Mean loss of the last log lines: {record['last_loss']}.",
            command="launch/train_instrument.py +exp=smollm2_ruler",
        )


def _load(settings: Settings[InstrumentConfig], mixture: Mixture) -> tuple[LoadedModel, GeneratedConversations]:
    """Return the model and its conversations.

    Raises
    ------
    ValueError
        If model and tokenizer disagree on the end of a turn, or no recipe fits the shortest length.
    """
    config = settings.train
    loaded, tokenizer = load_to_train(settings.model, config.max_length)
    end, ends = tokenizer.eos_token_id, loaded.model.generation_config.eos_token_id
    if end not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"{loaded.source} stops at token {ends}, but its tokenizer ends turns with {end}: the model would learn "
            "answers that never end. Set model.tokenizer to the model's own."
        )
    source = GeneratedConversations(mixture, tokenizer, config.asked_first)
    source.make("check", config.min_length)
    return loaded, source


def _adapted(model: Any, settings: Settings[InstrumentConfig]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = settings.train
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    # The model's name, not the directory that it was loaded from on this machine.
    adapted.peft_config["default"].base_model_name_or_path = settings.model.path
    return adapted.train()
