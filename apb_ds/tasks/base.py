"""The sample, the interface of a task, and the registry of tasks by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from apb_ds.config import check_choice, from_mapping
from apb_ds.tasks.control import mask
from apb_ds.tasks.prompts import EncodedDocument, encode_after, encode_embedded, encode_query
from apb_ds.tasks.template import check_arguments, has_template, with_template
from apb_ds.tasks.text import STANDARD_INPUT, check_text, check_text_source, read_text


@dataclass(frozen=True)
class Sample:
    """One document and one query, as token ids.

    Attributes
    ----------
    document_ids : (1, n), int64, global: the same on every rank
    query_ids : (1, q), int64, global
    query_position : document tokens before the user's text, where the anchor embeds the query
    max_new_tokens : tokens of an answer at most
    ground_truth : the right answer, or None if nothing is known
    generate : further arguments of `engine.generate`, such as temperature or stop_strings; greedy if empty
    random_ids : whether the ids are random because the model has no tokenizer
    answers : the texts that a right answer contains, if they are several or differ from `ground_truth`
    labels : what scores are grouped by, such as the kind of question and a needle's depth
    notes : what is recorded with the answer, such as the sample's source
    embedded_ids : (1, e), int64, global: what the anchor embeds instead of the query; None for the query itself
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

    @property
    def num_document(self) -> int:
        """The document's tokens."""
        return self.document_ids.shape[1]

    @property
    def num_query(self) -> int:
        """The query's tokens."""
        return self.query_ids.shape[1]

    @property
    def num_positions(self) -> int:
        """Tokens of document, query and the longest answer."""
        return self.num_document + self.num_query + self.max_new_tokens


class TaskConfig:
    """Settings of a task: the base class of frozen dataclasses, which raise ValueError for a value out of its range.

    Only the first rank makes samples; it sends their ids to the others.
    """

    name: ClassVar[str]

    def check_sources(self) -> None:
        """Raise ValueError if a file that the settings name is missing. Called on the first rank, before loading."""

    def fitted(self, max_positions: int | None) -> TaskConfig:
        """Return the settings for a model with `max_positions` (None: unlimited), for tasks that fit samples to it."""
        return self

    def chat_tokenizer(self, tokenizer: Any | None) -> Any:
        """Return the tokenizer as the task's prompts need it. For the first rank: it may read files."""
        return tokenizer

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the samples; without a tokenizer, of random ids below `vocab_size`."""
        raise NotImplementedError

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return how right the prediction is, from 0 to 1; None if there is nothing to compare it with."""
        if sample.ground_truth is None:
            return None
        return float(sample.ground_truth in prediction)


@dataclass(frozen=True)
class ConversationConfig(TaskConfig):
    """A task whose prompts go through the model's chat template.

    Parameters
    ----------
    system : str, optional
        A system prompt, which precedes the document: a text, or ``@FILE``.
    template : dict
        Arguments of the chat template, such as ``{enable_thinking: false}``.
    """

    system: str | None = None
    template: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.system is not None:
            object.__setattr__(self, "system", check_text("task.system", self.system))
            if self.system == STANDARD_INPUT:
                raise ValueError("task.system=-: a system prompt does not come from standard input; give it or @FILE.")
        check_arguments(self.template)

    def check_sources(self) -> None:
        if self.system is not None:
            check_text_source("task.system", self.system)

    def read_system(self) -> str | None:
        """Return the system prompt's text; ValueError if its file cannot be read."""
        return None if self.system is None else read_text("task.system", self.system)

    def chat_tokenizer(self, tokenizer: Any | None) -> Any:
        """Return the tokenizer with the system prompt and the template's arguments, see `with_template`."""
        allow_special = getattr(self, "allow_special_tokens", False)
        return with_template(tokenizer, self.read_system(), self.template, allow_special=allow_special)


_TASKS: dict[str, type[TaskConfig]] = {}
Config = TypeVar("Config", bound=type[TaskConfig])


def register_task(config: Config) -> Config:
    """Class decorator: register a `TaskConfig` under its `name`."""
    _TASKS[config.name] = config
    return config


def task_names() -> list[str]:
    """Return the names of all registered tasks."""
    return sorted(_TASKS)


def build_task_config(values: dict[str, Any]) -> TaskConfig:
    """Build the config of the task that ``values["name"]`` names; null leaves a key at its default.

    Raises
    ------
    ValueError
        For an unknown task, an unknown key (naming the nearest), or a value out of its range.
    """
    values = dict(values)
    name = values.pop("name", None)
    check_choice("task.name", name, task_names())
    return from_mapping(_TASKS[str(name)], values, "task")


def needs_tokenizer(tokenizer: Any | None, task: str) -> Any:
    """Return the tokenizer; ValueError if the model has none, such as one with random weights."""
    if tokenizer is None:
        raise ValueError(f"task={task} needs a tokenizer, and this model has none; set model.tokenizer.")
    return tokenizer


def text_sample(
    tokenizer: Any,
    document: EncodedDocument,
    query: str,
    answer_prefix: str = "",
    *,
    untemplated: str | None = None,
    **fields: Any,
) -> Sample:
    """Return a sample that asks `query` about a document.

    Parameters
    ----------
    answer_prefix : how the answer begins
    untemplated : the exact text after the document, for a model without a chat template. Default: the query on a line
        between blank ones, then the prefix.
    fields : the sample's other fields
    """
    if untemplated is None or has_template(tokenizer):
        query_ids = encode_query(tokenizer, document, query, answer_prefix)
    else:
        query_ids = encode_after(tokenizer, document.end, mask(tokenizer, untemplated))
    return Sample(
        document_ids=document.tensor,
        query_ids=torch.tensor([query_ids]),
        embedded_ids=torch.tensor([encode_embedded(tokenizer, document, query)]),
        query_position=document.query_position,
        **fields,
    )


def random_sample(num_tokens: int, query_tokens: int, vocab_size: int, seed: int, max_new_tokens: int) -> Sample:
    """Return a sample of random ids, for a model without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, num_tokens + query_tokens), generator=generator)
    document_ids, query_ids = ids.split([num_tokens, query_tokens], dim=1)
    return Sample(document_ids, query_ids, min(1, num_tokens), max_new_tokens, random_ids=True)
