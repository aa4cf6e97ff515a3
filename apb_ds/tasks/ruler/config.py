"""The settings of RULER, and its samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from apb_ds.config import check_choice, check_integer
from apb_ds.tasks.base import Sample, TaskConfig, register_task
from apb_ds.tasks.ruler import harness
from apb_ds.tasks.ruler.cache import cached, hash_tokenizer
from apb_ds.tasks.ruler.generate import Request, generate, sentence_splitter
from apb_ds.tasks.ruler.names import ESSAY_TASKS, SYNTHETIC_TASKS, TASKS
from apb_ds.tasks.ruler.prompts import make_sample
from apb_ds.tasks.ruler.sources import hash_files, source_files

# Raised when prompts come out otherwise from the same settings, so that none of before are taken from the cache.
PROMPTS_VERSION = 1


@register_task
@dataclass(frozen=True)
class RulerConfig(TaskConfig):
    """RULER's tasks, as lm-evaluation-harness makes and scores them.

    Parameters
    ----------
    tasks : str or list of str
        Their names. Default: the six that need no files.
    length : int or list of int, tokens
        What document, query and answer have to fit into, chat template included.
    num_samples : int
        Samples of each task at each length.
    data_dir : str, optional
        Folder with what the other tasks need: ``*.txt`` files to hide needles in, any text may stand in for the
        essays that RULER takes; ``dev-v2.0.json`` (SQuAD) and ``hotpot_dev_distractor_v1.json`` (HotpotQA).
    max_new_tokens : int, tokens, optional
        Length of an answer at most. Default: the task's own.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field and what is allowed.
    """

    name: ClassVar[str] = "ruler"
    tasks: str | list[str] | tuple[str, ...] = SYNTHETIC_TASKS
    length: int | list[int] | tuple[int, ...] = 4096
    num_samples: int = 10
    data_dir: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in ("tasks", "length"):
            given = getattr(self, field)
            values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            if not values or any(values.count(value) > 1 for value in values):
                raise ValueError(f"task.{field}={given!r} must name one or more, none of them twice.")
            object.__setattr__(self, field, values)
        for name in self.tasks:
            check_choice("task.tasks", name, TASKS)
        for length in self.lengths:
            # Below, no task has a prompt worth the name, and some generators never end.
            check_integer("task.length", length, 256)
        check_integer("task.num_samples", self.num_samples, 1)
        if self.max_new_tokens is not None:
            check_integer("task.max_new_tokens", self.max_new_tokens, 1)
            if self.max_new_tokens >= min(self.lengths):
                raise ValueError(
                    f"task.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                    f"task.length={min(self.lengths)}; it has to be smaller."
                )
        if self.data_dir is not None and (not isinstance(self.data_dir, str) or not self.data_dir):
            raise ValueError(f"task.data_dir={self.data_dir!r} must be the name of a folder.")

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.length if isinstance(self.length, tuple) else (self.length,)  # type: ignore[return-value]

    def check_sources(self) -> None:
        for name in self.tasks:
            source_files(name, self.data_dir)
        harness.check_installed()

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield `num_samples` samples of each task at each length.

        Raises
        ------
        ValueError
            Without a tokenizer; for a missing file; for a length that is too short for a task.
        RuntimeError
            If the harness is not installed.
        """
        if tokenizer is None:
            raise ValueError("task=ruler needs a tokenizer, to fit its prompts into task.length; set model.tokenizer.")
        self.check_sources()
        identity = hash_tokenizer(tokenizer)
        for name in self.tasks:
            task = harness.read_task(name)
            for length in self.lengths:
                request = self._request(task, length, seed)
                make = functools.partial(generate, task, tokenizer, request)
                made = cached(_key(task, identity, request), make)
                for row in made:
                    sample = make_sample(tokenizer, name, row, task.delimiter, request.max_new_tokens)
                    yield self._labelled(sample, length)

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return the score of the harness: which share of the references is in the prediction, letter case aside."""
        return harness.score(harness.read_task(sample.labels["task"]), sample.answers, prediction)

    def _request(self, task: harness.HarnessTask, length: int, seed: int) -> Request:
        return Request(
            length=length,
            num_samples=self.num_samples,
            max_new_tokens=task.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            seed=seed,
            files=tuple(source_files(task.name, self.data_dir)),
        )

    def _labelled(self, sample: Sample, length: int) -> Sample:
        """Return the sample with its labels, if it fits."""
        num_tokens = sample.document_ids.shape[1] + sample.query_ids.shape[1] + sample.max_new_tokens
        name = sample.labels["task"]
        if num_tokens > length:
            raise ValueError(
                f"task.length={length}: a prompt of {name} has {num_tokens} tokens with its answer, since this "
                "tokenizer counts the whole lower than its parts; use another tokenizer or leave this task out."
            )
        labels = {**sample.labels, "length": length}
        if name in ESSAY_TASKS:
            labels["essays"] = self.data_dir
        return dataclasses.replace(sample, labels=labels)


def _key(task: harness.HarnessTask, tokenizer: str, request: Request) -> dict[str, Any]:
    """Return all that decides how prompts come out."""
    return {
        "prompts": PROMPTS_VERSION,
        "harness": harness.harness_version(),
        "task": task.name,
        "tokenizer": tokenizer,
        "length": request.length,
        "seed": request.seed,
        "num_samples": request.num_samples,
        "max_new_tokens": request.max_new_tokens,
        "files": hash_files(list(request.files)),
        "sentences": sentence_splitter() if task.name in ESSAY_TASKS else "",
    }
