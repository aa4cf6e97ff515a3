"""The settings of InfiniteBench, and its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from apb_ds.config import check_choice, check_integer
from apb_ds.tasks.base import Sample, TaskConfig, register_task
from apb_ds.tasks.infinitebench.names import ANSWER_TOKENS, TASKS
from apb_ds.tasks.infinitebench.prompts import make_sample
from apb_ds.tasks.infinitebench.rows import find_file, read_rows
from apb_ds.tasks.infinitebench.scoring import check_rouge, score
from apb_ds.tasks.prompt import needs_tokenizer


@register_task
@dataclass(frozen=True)
class InfiniteBenchConfig(TaskConfig):
    """InfiniteBench's tasks, from the benchmark's own files.

    Parameters
    ----------
    tasks : str or list of str
        Their names. Default: all twelve.
    num_samples : int
        Samples of each task: the first rows of its file, fewer if there are fewer.
    data_dir : str
        Folder with ``<task>.jsonl`` of each task: ``id``, ``context``, ``input``, ``answer`` and ``options`` a line.
    max_tokens : int, tokens, optional
        What document, query and answer have to fit into, chat template included. A longer document loses its middle,
        as in the benchmark, and the label ``truncated`` says so. Default: the model's positions.
    max_new_tokens : int, tokens, optional
        Length of an answer at most. Default: the benchmark's, from 3 (math_find) to 30000 (math_calc).

    Raises
    ------
    ValueError
        For a value out of its range, naming the field and what is allowed.
    """

    name: ClassVar[str] = "infinitebench"
    tasks: str | list[str] | tuple[str, ...] = TASKS
    num_samples: int = 10
    data_dir: str | None = None
    max_tokens: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        tasks = tuple(self.tasks) if isinstance(self.tasks, (list, tuple)) else (self.tasks,)
        if not tasks or any(tasks.count(task) > 1 for task in tasks):
            raise ValueError(f"task.tasks={self.tasks!r} must name one or more, none of them twice.")
        for task in tasks:
            check_choice("task.tasks", task, TASKS)
        object.__setattr__(self, "tasks", tasks)
        check_integer("task.num_samples", self.num_samples, 1)
        for field in ("max_tokens", "max_new_tokens"):
            if getattr(self, field) is not None:
                check_integer(f"task.{field}", getattr(self, field), 1)
        if self.data_dir is not None and (not isinstance(self.data_dir, str) or not self.data_dir):
            raise ValueError(f"task.data_dir={self.data_dir!r} must be the name of a folder.")

    def check_sources(self) -> None:
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
            Without a tokenizer; for a file that is missing; for a row that is none of its task's, naming the line; if
            `max_tokens` leaves no room for a document.
        RuntimeError
            If a package is missing that scores a task.
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
