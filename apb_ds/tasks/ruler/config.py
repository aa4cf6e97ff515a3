"""The settings of RULER, and its samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from apb_ds.config import check_choice, check_integer
from apb_ds.tasks.base import ConversationConfig, Sample, needs_tokenizer, register_task
from apb_ds.tasks.checks import check_integers, check_optional_text, distinct
from apb_ds.tasks.ruler import harness
from apb_ds.tasks.ruler.cache import cached, hash_tokenizer
from apb_ds.tasks.ruler.generate import PromptSpec, generate, sentence_splitter
from apb_ds.tasks.ruler.names import ESSAY_TASKS, SYNTHETIC_TASKS, TASKS
from apb_ds.tasks.ruler.prompts import make_sample
from apb_ds.tasks.ruler.sources import hash_files, source_files

# Raise this when the same settings give other prompts, so that cached ones are not used.
PROMPTS_VERSION = 1
# With less, no task has a sensible prompt, and some generators never end.
SHORTEST = 256


@register_task
@dataclass(frozen=True)
class RulerConfig(ConversationConfig):
    """RULER's tasks, as lm-evaluation-harness makes and scores them.

    Parameters
    ----------
    tasks : str or list of str
        Names of tasks. Default: the six that need no files.
    length : int or list of int, tokens
        What document, query and answer must fit into, chat template included.
    num_samples : int
        Samples of each task at each length.
    data_dir : str, optional
        Folder with what the other tasks need: ``*.txt`` files to hide needles in, for which any text may replace
        RULER's essays; ``dev-v2.0.json`` (SQuAD) and ``hotpot_dev_distractor_v1.json`` (HotpotQA).
    max_new_tokens : int, tokens, optional
        Length of an answer at most. Default: the task's own.
    system, template : see `ConversationConfig`
    """

    name: ClassVar[str] = "ruler"
    tasks: str | list[str] | tuple[str, ...] = SYNTHETIC_TASKS
    length: int | list[int] | tuple[int, ...] = 4096
    num_samples: int = 10
    data_dir: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("tasks", "length"):
            object.__setattr__(self, field, distinct(f"task.{field}", getattr(self, field)))
        for name in self.tasks:
            check_choice("task.tasks", name, TASKS)
        for length in self.lengths:
            check_integer("task.length", length, SHORTEST)
        check_integers(self, num_samples=1, max_new_tokens=1)
        if self.max_new_tokens is not None and self.max_new_tokens >= min(self.lengths):
            raise ValueError(
                f"task.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"task.length={min(self.lengths)}; lower it."
            )
        check_optional_text("task.data_dir", self.data_dir, "the name of a folder")

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.length if isinstance(self.length, tuple) else (self.length,)  # type: ignore[return-value]

    def check_sources(self) -> None:
        super().check_sources()
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
        tokenizer = needs_tokenizer(tokenizer, self.name)
        self.check_sources()
        identity = hash_tokenizer(tokenizer)
        for name in self.tasks:
            task = harness.read_task(name)
            for length in self.lengths:
                spec = PromptSpec(
                    length=length,
                    num_samples=self.num_samples,
                    max_new_tokens=self.max_new_tokens or task.max_new_tokens,
                    seed=seed,
                    files=tuple(source_files(name, self.data_dir)),
                )
                for row in cached(_key(name, identity, spec), functools.partial(generate, task, tokenizer, spec)):
                    yield self._checked(make_sample(tokenizer, name, row, task.delimiter, spec.max_new_tokens), length)

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return the harness's score: the share of references that the prediction contains, ignoring case."""
        return harness.score(harness.read_task(sample.labels["task"]), sample.answers, prediction)

    def _checked(self, sample: Sample, length: int) -> Sample:
        """Return the sample with its labels, if it fits."""
        name = sample.labels["task"]
        if sample.num_positions > length:
            raise ValueError(
                f"task.length={length}: a prompt of {name} has {sample.num_positions} tokens with its answer, because "
                "this tokenizer splits the whole text into more tokens than its parts; use another tokenizer or leave "
                "this task out."
            )
        labels = {**sample.labels, "length": length}
        if name in ESSAY_TASKS:
            labels["essays"] = self.data_dir
        return dataclasses.replace(sample, labels=labels)


def _key(task: str, tokenizer: str, spec: PromptSpec) -> dict[str, Any]:
    """Return everything that decides what the prompts are."""
    return {
        "prompts": PROMPTS_VERSION,
        "harness": harness.harness_version(),
        "task": task,
        "tokenizer": tokenizer,
        **dataclasses.asdict(spec),
        "files": hash_files(list(spec.files)),
        "sentences": sentence_splitter() if task in ESSAY_TASKS else "",
    }
