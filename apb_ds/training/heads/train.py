"""Train retaining heads: the model is frozen, and heads learn to predict what its attention will need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb_ds.compressors.retaining_heads import RetainingHeads, write_heads
from apb_ds.hf.architecture import check_supported
from apb_ds.hf.interface import check_projections
from apb_ds.loading import LoadedModel
from apb_ds.loading.heads import head_sizes
from apb_ds.parallel.failure.ending import Watch
from apb_ds.parallel.groups import SequenceGroup, training_group
from apb_ds.session.steps import Steps
from apb_ds.training.batches import Batch
from apb_ds.training.card import make_card
from apb_ds.training.config import Settings, read_settings
from apb_ds.training.heads.config import HeadsConfig
from apb_ds.training.heads.examples import ExampleMaker
from apb_ds.training.heads.metrics import measure_all
from apb_ds.training.heads.module import HeadsLoss
from apb_ds.training.heads.sharegpt import ShareGPT
from apb_ds.training.heads.texts import find_texts, places_of, split_texts
from apb_ds.training.loop import HELD_OUT_KEY, Training, load_to_train, run
from apb_ds.training.mixture import Mixture
from apb_ds.training.output import open_output

HEADS_NAME = "heads.safetensors"
DTYPES = (torch.float32, torch.bfloat16)
ABOUT = """\
Per layer, `fc2(act(fc1([q; k; v])))` predicts which tokens of a block later tokens will attend to (Locret, arXiv
2410.01805): {parameters:,} parameters in `{file}`, trained on labels from the frozen model's attention. Documents come
from `task=synthetic`'s split `train` and from real text ({texts}).

Use them with `method.compressor=retaining_heads method.retaining_heads=<this directory>`.\
"""
RESULT = """\
On {held_out} held-out conversations, in {measured_hosts} blocks that keep one token in {measured_ratio:g} each:

| step | loss | overlap of the top tenth | attention mass kept | at random | at best |
| --- | --- | --- | --- | --- | --- |
"""
COLUMNS = ("loss", "overlap", "mass", "mass_random", "mass_best")


def train_heads(values: dict[str, Any], overrides: str = "", watch: Watch | None = None) -> dict[str, Any]:
    """Train as a composed config says, all ranks together; resume where an earlier run was interrupted.

    Parameters
    ----------
    overrides : the command line's arguments, for the card
    watch : the process's, which follows the group

    Returns
    -------
    dict
        The record, which is also in the output directory next to ``heads/``.

    Raises
    ------
    ValueError, RuntimeError
        For settings out of their range, on every rank, before the ranks meet.
    JobError
        If the output directory holds something else, the model cannot be loaded or does not support heads, or there is
        nothing to train on.
    """
    settings = read_settings(HeadsConfig, values)
    mixture = Mixture(settings.train.mixture)
    group = training_group(settings.timeout_s, watch)
    steps = Steps(group, debug=settings.debug)
    loaded, tokenizer = steps.together(lambda: _load(settings), local=True)
    files = steps.from_first(lambda: _find_files(settings.train))
    data = steps.together(lambda: make_data(settings.train, mixture, files, tokenizer), local=True)
    steps.from_first(lambda: open_output(settings.directory, settings.recorded(), overwrite=settings.train.overwrite))
    return run(HeadsTraining(settings, loaded, data, overrides), group)


@dataclass(frozen=True)
class Data:
    """What heads are trained on and, from other texts, measured on; `files` are the texts of both."""

    training: ExampleMaker
    measuring: ExampleMaker
    files: list[Path]


class HeadsTraining(Training):
    """Retaining heads for a frozen model, on labels from its own attention."""

    folder = "heads"

    def __init__(self, settings: Settings[HeadsConfig], loaded: LoadedModel, data: Data, overrides: str) -> None:
        config = settings.train
        heads = RetainingHeads.random(head_sizes(loaded.model), config.hidden_size, settings.seed).to(loaded.device)
        self.heads_loss = HeadsLoss(loaded.model, heads, config, config.smoothing, config.observed_hosts)
        super().__init__(settings, loaded, self.heads_loss, data.training)
        self.measure_every = config.measure_every
        self.files = data.files
        self.overrides = overrides
        # Always the same ones, of the largest length.
        self.held_out = [
            data.measuring.make(f"held out.{index}", config.max_length) for index in range(config.held_out)
        ]

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.input_ids, batch.is_marked, batch.num_document

    def measure(self, group: SequenceGroup) -> dict[str, Any]:
        config, device = self.settings.train, self.loaded.device
        hosts, ratio = config.measured_hosts, config.measured_ratio
        return measure_all(self.heads_loss, self.held_out, group, hosts=hosts, ratio=ratio, device=device)

    def write_weights(self, directory: Path, step: int) -> None:
        write_heads(self.heads_loss.heads, directory / HEADS_NAME, {"step": str(step)})

    def results(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "parameters": sum(parameter.numel() for parameter in self.heads_loss.heads.parameters()),
            "curve": [{"step": line["step"], **line[HELD_OUT_KEY]} for line in lines if HELD_OUT_KEY in line],
            "texts": {"number": len(self.files), "places": places_of(self.files)},
            "overrides": self.overrides,
        }

    def card(self, record: dict[str, Any]) -> str:
        texts = ", ".join(record["texts"]["places"]) or "none"
        rows = [
            f"| {line['step']} | {' | '.join(f'{line[name]:.4f}' for name in COLUMNS)} |" for line in record["curve"]
        ]
        return make_card(
            record,
            "apb_ds",
            "[long-context, kv-cache, retaining-heads]",
            title=f"Retaining heads for {self.settings.model.path}",
            about=ABOUT.format(parameters=record["parameters"], file=HEADS_NAME, texts=texts),
            result=RESULT.format(**record["settings"]["train"]) + "\n".join(rows),
            command=f"launch/train_heads.py {record['overrides']}",
        )


def _load(settings: Settings[HeadsConfig]) -> tuple[LoadedModel, Any]:
    loaded, tokenizer = load_to_train(settings.model, settings.train.max_length)
    if loaded.dtype not in DTYPES:
        raise ValueError(f"model.dtype={settings.model.dtype!r}: heads train in bfloat16 or float32; set one of them.")
    check_supported(loaded.model)
    check_projections(loaded.model)
    head_sizes(loaded.model)
    return loaded, tokenizer


def _find_files(config: HeadsConfig) -> list[Path]:
    """Return the texts to draw from.

    Raises
    ------
    ValueError
        If they, or `config.data`, cannot be used.
    """
    if config.data is not None:
        ShareGPT(config.data).check()
    uses_texts = config.text_share + config.quote_share + config.continue_share > 0
    if not uses_texts or (config.data is not None and config.data_share == 1):
        return []
    files = find_texts(config.texts)
    if not files:
        raise ValueError("train.texts: this machine has none of the default texts; name files or folders.")
    return files


def make_data(config: HeadsConfig, mixture: Mixture, files: list[Path], tokenizer: Any) -> Data:
    """Return the makers of conversations over these texts.

    Raises
    ------
    ValueError
        If no conversation is as short as `config.min_length`.
    """
    makers = []
    for texts, held_out in zip(split_texts(files), (False, True), strict=True):
        data = None if config.data is None else ShareGPT(config.data, held_out=held_out)
        makers.append(ExampleMaker(config, mixture, texts, data, tokenizer))
    makers[0].make("check", config.min_length)
    return Data(makers[0], makers[1], files)
