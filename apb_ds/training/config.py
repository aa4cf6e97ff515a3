"""What a training run is to do, validated before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Self

from apb_ds.config import check_bool, check_choice, check_integer


@dataclass(frozen=True)
class TrainingConfig:
    """What all trainings have in common.

    Parameters
    ----------
    output : str
        Directory of what is trained, its card, the log and the checkpoints. A run that was stopped goes on there.
    overwrite : bool
        Start anew, whatever is there.
    steps : int
        Optimiser steps.
    tokens_per_step : int, tokens
        Of each rank, padding included; one conversation at least.
    min_length, max_length : int, tokens
        Of a conversation: document, questions and answers.
    growth : float
        Share of the steps over which the longest conversation grows to `max_length`, from 0 to 1. After that, lengths
        are drawn evenly.
    mixture : list of dict
        What documents are made of, see `apb_ds.training.mixture`.
    learning_rate, warmup_steps, weight_decay : float, int, float
        AdamW's; the rate rises linearly and then falls to zero.
    clip : float
        What gradients are clipped to.
    checkpoint_every, log_every : int, steps
    workers : int or None
        Processes of each rank that make conversations. Default: as many as there are cores to spare, at most 8.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field, the value and what is allowed.
    """

    output: str = ""
    overwrite: bool = False
    steps: int = 1000
    tokens_per_step: int = 32768
    min_length: int = 512
    max_length: int = 7900
    growth: float = 0.5
    mixture: list[dict[str, Any]] = field(default_factory=list)
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_every: int = 200
    log_every: int = 10
    workers: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.output, str) or not self.output:
            raise ValueError(f"train.output={self.output!r} must be the name of a directory.")
        check_bool("train.overwrite", self.overwrite)
        self._check_counts("steps", "tokens_per_step", "checkpoint_every", "log_every")
        check_integer("train.min_length", self.min_length, 256)
        check_integer("train.max_length", self.max_length, self.min_length)
        check_integer("train.warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps={self.warmup_steps} must be below train.steps={self.steps}.")
        if self.workers is not None:
            check_integer("train.workers", self.workers, 0)
        self._check_numbers(("learning_rate", "clip"), above=True)
        self._check_numbers(("weight_decay",), above=False)
        self._check_shares("growth")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a mapping; null is the default, an unknown key a ValueError that names the nearest field."""
        names = [item.name for item in fields(cls)]
        for key in values:
            check_choice("train key", key, names)
        return cls(**{key: value for key, value in values.items() if value is not None})

    def _check_counts(self, *names: str) -> None:
        for name in names:
            check_integer(f"train.{name}", getattr(self, name), 1)

    def _check_numbers(self, names: Iterable[str], *, above: bool) -> None:
        """Refuse what is no number of at least 0, or `above` it."""
        for name in names:
            value = getattr(self, name)
            if not is_number(value) or value < 0 or (above and value == 0):
                raise ValueError(f"train.{name}={value!r} must be a number {'above' if above else 'of at least'} 0.")

    def _check_shares(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"train.{name}={value!r} must be a number from 0 to 1.")


@dataclass(frozen=True)
class InstrumentConfig(TrainingConfig):
    """Training of an evaluation instrument: a LoRA that teaches a small model to find things in long documents.

    Gradients are clipped to a norm; the learning rate falls as a cosine.

    Parameters
    ----------
    at_longest : float
        Share of the steps after that in which conversations have `max_length` instead. Distances that are rare in
        training are what fails first.
    lora_rank, lora_alpha : int
        LoRA (arXiv 2106.09685) on all linear layers.
    asked_first : float
        Share of the conversations in which the first question also stands ahead of the document.
    fused : bool
        Compile the decoder layers with ``torch.compile``, on CUDA. That takes a minute or two at the start.
    further ones : see `TrainingConfig`
    """

    lora_rank: int = 16
    lora_alpha: int = 32
    at_longest: float = 0.0
    asked_first: float = 0.0
    fused: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("train.fused", self.fused)
        self._check_counts("lora_rank", "lora_alpha")
        self._check_shares("at_longest", "asked_first")


def is_number(value: object) -> bool:
    """Whether the value is a finite number (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
