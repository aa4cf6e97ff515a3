"""The sample, the interface of a task, and the registry of tasks by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from apb_ds.config import check_choice


@dataclass(frozen=True)
class Sample:
    """One document and one query, as token ids.

    Attributes
    ----------
    document_ids : (1, n), int64, global: the same on every rank
    query_ids : (1, q), int64, global
    query_position : document tokens before the user's text, where the anchor embeds the query
    max_new_tokens : how many tokens to generate at most
    ground_truth : the answer, or None if there is none to compare with
    generate : further arguments of `engine.generate`, such as temperature or stop_strings; greedy if there are none
    random_ids : whether the ids are random, for want of a tokenizer
    answers : all that is wanted of an answer, where that is more than one string or not `ground_truth` word for word
    labels : what scores are grouped by, such as the kind of question and the depth of a needle
    notes : what is written beside the answer, such as where the sample comes from
    embedded_ids : (1, e), int64, global: what the anchor embeds in place of the query; None for the query itself
    """

    document_ids: Tensor
    query_ids: Tensor
    query_position: int
    max_new_tokens: int
    ground_truth: str | None = None
    generate: dict[str, Any] = field(default_factory=dict)
    random_ids: bool = False
    answers: tuple[str, ...] = ()
    labels: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    embedded_ids: Tensor | None = None

    @property
    def anchor_query_ids(self) -> Tensor:
        """What a prefill is given as its query."""
        return self.query_ids if self.embedded_ids is None else self.embedded_ids


class TaskConfig:
    """Settings of a task: the base of frozen dataclasses that are validated when they are made.

    Samples are made on the first rank alone, which sends their ids to the others.
    """

    name: ClassVar[str]

    def check_sources(self) -> None:
        """Raise ValueError if something that the settings point to is not there. On the first rank, before loading."""

    def fitted(self, max_positions: int | None) -> TaskConfig:
        """Return the settings for a model of so many positions (None: no limit), for tasks that fit samples to it."""
        return self

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the samples; without a tokenizer, of random ids below `vocab_size`."""
        raise NotImplementedError

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return how right the prediction is, from 0 to 1; None where there is nothing to compare it with."""
        if sample.ground_truth is None:
            return None
        return float(sample.ground_truth in prediction)


_TASKS: dict[str, type[TaskConfig]] = {}
Config = TypeVar("Config", bound=type[TaskConfig])


def register_task(config: Config) -> Config:
    """Class decorator: make a `TaskConfig` known by its `name`."""
    _TASKS[config.name] = config
    return config


def task_names() -> list[str]:
    """Return the names of all known tasks."""
    return sorted(_TASKS)


def build_task_config(values: dict[str, Any]) -> TaskConfig:
    """Build the config of the task that ``values["name"]`` names; null is the default.

    Raises
    ------
    ValueError
        For an unknown task, an unknown key (naming the nearest), or a value out of its range.
    """
    values = dict(values)
    name = values.pop("name", None)
    check_choice("task.name", name, task_names())
    config = _TASKS[str(name)]
    names = [item.name for item in fields(config)]  # type: ignore[arg-type] # the base is no dataclass
    for key in values:
        check_choice("task key", key, names)
    return config(**{key: value for key, value in values.items() if value is not None})


def random_sample(num_tokens: int, query_tokens: int, vocab_size: int, seed: int, max_new_tokens: int) -> Sample:
    """Return a sample of random ids, for a model without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, num_tokens + query_tokens), generator=generator)
    document_ids, query_ids = ids.split([num_tokens, query_tokens], dim=1)
    return Sample(document_ids, query_ids, min(1, num_tokens), max_new_tokens, random_ids=True)
