"""What a training of retaining heads is to do, validated before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from apb_ds.config import check_bool, check_choice, check_integer
from apb_ds.training.heads.examples import OBSERVERS, Observing
from apb_ds.training.heads.labels import LabelKind


@dataclass(frozen=True)
class HeadsConfig:
    """Training of retaining heads (Locret, arXiv 2410.01805), by default as published but for the data.

    Parameters
    ----------
    output : str
        Directory of the heads, their card, the log and the checkpoints. A run that was stopped goes on there.
    overwrite : bool
        Start anew, whatever is there.
    hidden_size : int
        Of the heads.
    steps : int
        Optimiser steps.
    tokens_per_step : int, tokens
        Of each rank; one conversation at least.
    min_length, max_length : int, tokens
        Of a conversation: document, question and answer.
    growth : float
        Share of the steps over which the longest conversation grows to `max_length`, from 0 to 1.
    mixture : list of dict
        Made-up documents, see `apb_ds.training.mixture`.
    texts : list of str or None
        Files and folders of real text. Default: see `apb_ds.training.heads.texts`.
    text_share, quote_share, continue_share : float
        See `apb_ds.training.heads.examples.Sources`.
    data : str or None
        A JSONL file of conversations in ShareGPT's format.
    data_share : float
        How often one of these is taken instead of something made up.
    observers : str
        ``answer``: the tokens of the answers observe the document (Locret). ``later``: any tokens observe those before.
    num_observers : int
        The most that there are in a conversation; of more, as many are drawn.
    observed_hosts : int or None
        Tokens observe only the blocks before their own, of so many. Default: all tokens before them.
    label, over_observers, over_heads, standardise
        See `apb_ds.training.heads.labels.LabelKind`.
    smoothing : float
        Factor of the mean squared difference of neighbouring scores.
    learning_rate, warmup_steps, weight_decay : float, int, float
        AdamW with a linear warm-up, then linear to zero.
    clip : float
        The largest value of a gradient's entry, either way.
    checkpoint_every, log_every, measure_every : int, steps
    held_out : int
        Conversations to measure on.
    measured_hosts, measured_ratio : int, float
        Measured is what a prefill with so many hosts and such a compression ratio would keep.
    workers : int or None
        Processes of each rank that make conversations. Default: as many as there are cores to spare, at most 8.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field, the value and what is allowed.
    """

    output: str = ""
    overwrite: bool = False
    hidden_size: int = 1024
    steps: int = 3000
    tokens_per_step: int = 10240
    min_length: int = 1024
    max_length: int = 10240
    growth: float = 0.0
    mixture: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] | None = None
    text_share: float = 0.5
    quote_share: float = 0.1
    continue_share: float = 0.1
    data: str | None = None
    data_share: float = 1.0
    observers: str = "answer"
    num_observers: int = 512
    observed_hosts: int | None = None
    label: str = "logit"
    over_observers: str = "max"
    over_heads: str = "max"
    standardise: bool = False
    smoothing: float = 0.0025
    learning_rate: float = 5e-4
    warmup_steps: int = 2000
    weight_decay: float = 0.01
    clip: float = 0.5
    checkpoint_every: int = 200
    log_every: int = 10
    measure_every: int = 200
    held_out: int = 16
    measured_hosts: int = 8
    measured_ratio: float = 8.0
    workers: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.output, str) or not self.output:
            raise ValueError(f"train.output={self.output!r} must be the name of a directory.")
        check_bool("train.overwrite", self.overwrite)
        for name in ("hidden_size", "steps", "tokens_per_step", "num_observers", "held_out", "measured_hosts"):
            check_integer(f"train.{name}", getattr(self, name), 1)
        for name in ("checkpoint_every", "log_every", "measure_every"):
            check_integer(f"train.{name}", getattr(self, name), 1)
        check_integer("train.min_length", self.min_length, 256)
        check_integer("train.max_length", self.max_length, self.min_length)
        check_integer("train.warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps={self.warmup_steps} must be below train.steps={self.steps}.")
        for name, least in (("workers", 0), ("observed_hosts", 2)):
            if getattr(self, name) is not None:
                check_integer(f"train.{name}", getattr(self, name), least)
        check_choice("train.observers", self.observers, OBSERVERS)
        self.label_kind  # noqa: B018 (for what it raises)
        self._check_numbers()
        self._check_sources()

    def _check_numbers(self) -> None:
        for name, positive in (("learning_rate", True), ("clip", True), ("weight_decay", False), ("smoothing", False)):
            value = getattr(self, name)
            if not _is_number(value) or value < 0 or (positive and value == 0):
                raise ValueError(f"train.{name}={value!r} must be a number {'above' if positive else 'of at least'} 0.")
        for name in ("growth", "text_share", "quote_share", "continue_share", "data_share"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"train.{name}={value!r} must be a number from 0 to 1.")
        if self.quote_share + self.continue_share > 1:
            raise ValueError(
                f"train.quote_share={self.quote_share} and train.continue_share={self.continue_share} are more than 1 "
                "together; lower one."
            )
        if not _is_number(self.measured_ratio) or self.measured_ratio < 1:
            raise ValueError(f"train.measured_ratio={self.measured_ratio!r} must be a number of at least 1.")

    def _check_sources(self) -> None:
        texts = self.texts
        if texts is not None and (
            not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts)
        ):
            raise ValueError(f"train.texts={texts!r} must be a list of text files or folders of them.")
        if self.data is not None and (not isinstance(self.data, str) or not self.data):
            raise ValueError(f"train.data={self.data!r} must be a JSONL file.")

    @property
    def label_kind(self) -> LabelKind:
        return LabelKind(self.label, self.over_observers, self.over_heads, self.standardise)

    @property
    def observing(self) -> Observing:
        return Observing(self.observers, self.num_observers)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadsConfig:
        """Build from a mapping; null is the default, an unknown key a ValueError that names the nearest field."""
        names = [item.name for item in fields(cls)]
        for key in values:
            check_choice("train key", key, names)
        return cls(**{key: value for key, value in values.items() if value is not None})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
