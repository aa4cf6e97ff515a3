"""The settings of InfiniteBench, and its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from apb_ds.config import check_choice
from apb_ds.tasks.base import ConversationConfig, Sample, needs_tokenizer, register_task
from apb_ds.tasks.checks import check_integers, check_optional_text, distinct
from apb_ds.tasks.infinitebench.names import ANSWER_TOKENS, TASKS
from apb_ds.tasks.infinitebench.prompts import make_sample
from apb_ds.tasks.infinitebench.rows import find_file, read_rows
from apb_ds.tasks.infinitebench.scoring import check_rouge, score


@register_task
@dataclass(frozen=True)
class InfiniteBenchConfig(ConversationConfig):
    """InfiniteBench's tasks, from the benchmark's own files.

    Parameters
    ----------
    tasks : str or list of str
        Names of tasks. Default: all twelve.
    num_samples : int
        Samples of each task: the first rows of its file, all if it has fewer.
    data_dir : str
        Folder with ``<task>.jsonl`` for each task: ``id``, ``context``, ``input``, ``answer`` and ``options`` a line.
    max_tokens : int, tokens, optional
        What document, query and answer must fit into, chat template included. A longer document loses its middle, as
        in the benchmark, and the label ``truncated`` says so. Default: the model's positions.
    max_new_tokens : int, tokens, optional
        Length of an answer at most. Default: the benchmark's, from 3 (math_find) to 30000 (math_calc).
    system, template : see `ConversationConfig`
    """

    name: ClassVar[str] = "infinitebench"
    tasks: str | list[str] | tuple[str, ...] = TASKS
    num_samples: int = 10
    data_dir: str | None = None
    max_tokens: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tasks", distinct("task.tasks", self.tasks))
        for task in self.tasks:
            check_choice("task.tasks", task, TASKS)
        check_integers(self, num_samples=1, max_tokens=1, max_new_tokens=1)
        check_optional_text("task.data_dir", self.data_dir, "the name of a folder")

    def check_sources(self) -> None:
        super().check_sources()
        for task in self.tasks:
            find_file(task, self.data_dir)
        if "longbook_sum_eng" in self.tasks:
            check_rouge()

    def fitted(self, max_positions: int | None) -> InfiniteBenchConfig:
        """Return the settings with `max_positions` as `max_tokens`, unless that is given."""
        return dataclasses.replace(self, max_tokens=max_positions if self.max_tokens is None else self.max_tokens)

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the samples, task by task, in the order of the files.

        Raises
        ------
        ValueError
            Without a tokenizer; for a missing file; for a row that does not fit its task, naming the line; if
            `max_tokens` leaves no room for a document.
        RuntimeError
            If a package that scores a task is missing.
        """
        tokenizer = needs_tokenizer(tokenizer, self.name)
        self.check_sources()
        for task in self.tasks:
            max_new_tokens = ANSWER_TOKENS[task] if self.max_new_tokens is None else self.max_new_tokens
            for row in read_rows(task, find_file(task, self.data_dir), self.num_samples):
                yield make_sample(tokenizer, task, row, max_new_tokens, self.max_tokens)

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return the benchmark's score, see `apb_ds.tasks.infinitebench.scoring`."""
        return score(sample.labels["task"], sample.answers, prediction)
