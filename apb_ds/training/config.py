"""The settings of a training, validated before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from apb_ds.config import check_bool, check_choice, check_integer, from_mapping
from apb_ds.loading import ModelConfig
from apb_ds.parallel.groups import DEFAULT_TIMEOUT_S
from apb_ds.session.job import MAX_SEED
from apb_ds.training.batches import Lengths

SECTIONS = ("model", "train", "parallel", "seed", "debug")


@dataclass(frozen=True)
class TrainingConfig:
    """The fields that all trainings share.

    Parameters
    ----------
    output : str
        Directory for the trained weights, their card, the log and checkpoints. An interrupted training resumes there.
    overwrite : bool
        Start over, and replace the training in `output`.
    steps : int
        Optimiser steps.
    tokens_per_step : int, tokens
        Per rank, padding included; at least one conversation.
    min_length, max_length : int, tokens
        Of a conversation: document, questions and answers.
    growth : float
        Share of the steps, from 0 to 1, over which the longest conversation grows to `max_length`. After that, lengths
        are drawn uniformly.
    mixture : list of dict
        Which documents are generated, see `apb_ds.training.mixture`.
    learning_rate, warmup_steps, weight_decay : float, int, float
        AdamW's; the rate rises linearly, then falls to zero.
    clip : float
        Gradient clipping.
    checkpoint_every, log_every : int, steps
    workers : int or None
        Processes per rank that generate conversations. Default: as many as there are spare cores, at most 8.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field, the value and what is allowed.

    Attributes
    ----------
    schedule : how the learning rate falls, ``cosine`` or ``linear``
    clips_values : whether `clip` limits each value of a gradient, not the norm of all. Each rank then clips its own
        gradients before they are averaged.
    """

    schedule: ClassVar[str] = "cosine"
    clips_values: ClassVar[bool] = False

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
        self._check_integers(1, "steps", "tokens_per_step", "checkpoint_every", "log_every")
        self._check_integers(256, "min_length")
        self._check_integers(self.min_length, "max_length")
        self._check_integers(0, "warmup_steps")
        if self.workers is not None:
            self._check_integers(0, "workers")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps={self.warmup_steps} must be below train.steps={self.steps}.")
        check_number("train.learning_rate", self.learning_rate, above=0)
        check_number("train.clip", self.clip, above=0)
        check_number("train.weight_decay", self.weight_decay, minimum=0)
        self._check_shares("growth")

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.min_length, self.max_length, self.growth)

    def _check_integers(self, minimum: int, *names: str) -> None:
        for name in names:
            check_integer(f"train.{name}", getattr(self, name), minimum)

    def _check_shares(self, *names: str) -> None:
        for name in names:
            check_number(f"train.{name}", getattr(self, name), minimum=0, maximum=1)


@dataclass(frozen=True)
class InstrumentConfig(TrainingConfig):
    """Training of an evaluation model: a LoRA with which a small model finds things in long documents.

    Parameters
    ----------
    at_longest : float
        Share of the steps after `growth` in which all conversations have `max_length`. Distances that are rare in
        training fail first.
    lora_rank, lora_alpha : int
        LoRA (arXiv 2106.09685) on all linear layers.
    asked_first : float
        Share of the conversations whose first question also precedes the document.
    fused : bool
        Compile the decoder layers with ``torch.compile``, on CUDA. Takes a minute or two at the start.
    others : see `TrainingConfig`
    """

    lora_rank: int = 16
    lora_alpha: int = 32
    at_longest: float = 0.0
    asked_first: float = 0.0
    fused: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("train.fused", self.fused)
        self._check_integers(1, "lora_rank", "lora_alpha")
        self._check_shares("at_longest", "asked_first")

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.min_length, self.max_length, self.growth, self.at_longest)


Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True)
class Settings(Generic[Config]):
    """A composed config: the training's own section, and those that all trainings have."""

    train: Config
    model: ModelConfig
    seed: int
    timeout_s: float
    debug: bool

    @property
    def directory(self) -> Path:
        return Path(self.train.output).expanduser()

    def recorded(self) -> dict[str, Any]:
        """Return what determines the result, by section."""
        return {"train": asdict(self.train), "seed": self.seed, "model": asdict(self.model)}


def read_settings(config_class: type[Config], values: Mapping[str, Any]) -> Settings[Config]:
    """Validate a composed config.

    Raises
    ------
    ValueError
        For an unknown key or a value out of its range.
    """
    for key in values:
        check_choice("config key", key, SECTIONS)
    parallel, model = values.get("parallel") or {}, ModelConfig.from_dict(dict(values.get("model") or {}))
    for key, default in (("shard_ranks", None), ("stages", 1)):
        if parallel.get(key, default) not in (None, default):
            raise ValueError(f"parallel.{key}={parallel[key]} is for inference; leave it out.")
    seed = values.get("seed") or 0
    check_integer("seed", seed, 0)
    if seed > MAX_SEED:
        raise ValueError(f"seed={seed} must be an integer of at most {MAX_SEED}.")
    return Settings(
        train=from_mapping(config_class, values.get("train") or {}, "train"),
        model=model,
        seed=seed,
        timeout_s=parallel.get("timeout_s") or DEFAULT_TIMEOUT_S,
        debug=bool(values.get("debug")),
    )


def check_number(
    field: str, value: object, *, above: float | None = None, minimum: float = -math.inf, maximum: float = math.inf
) -> None:
    """Raise ValueError unless `value` is a finite number within the bounds (a bool is not a number)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and minimum <= value <= maximum and (above is None or value > above):  # type: ignore[operator]
        return
    if above is not None:
        allowed = f"above {above:g}"
    else:
        allowed = f"of at least {minimum:g}" if maximum == math.inf else f"from {minimum:g} to {maximum:g}"
    raise ValueError(f"{field}={value!r} must be a number {allowed}.")
