"""One question about one document, both given by the user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from apb_ds.config import check_bool
from apb_ds.tasks.answering import AnsweringConfig
from apb_ds.tasks.base import Sample, register_task
from apb_ds.tasks.prompts import encode_document, encode_embedded, encode_query
from apb_ds.tasks.text import STANDARD_INPUT, check_text, check_text_source, read_text


@register_task
@dataclass(frozen=True)
class PromptConfig(AnsweringConfig):
    """A document and a query.

    Parameters
    ----------
    document, query : str
        The text, ``@FILE`` for a file's contents, or ``-`` for standard input (one of the two at most).
    stream : bool
        Whether the answer is printed as it comes.
    max_new_tokens and so on : see `AnsweringConfig`

    Raises
    ------
    ValueError
        For a value out of its range, naming the field and what is allowed.
    """

    name: ClassVar[str] = "prompt"
    document: str = ""
    query: str = ""
    stream: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("document", "query"):
            object.__setattr__(self, field, check_text(f"task.{field}", getattr(self, field)))
        check_bool("task.stream", self.stream)
        if self.document == self.query == STANDARD_INPUT:
            raise ValueError("task.document and task.query are both -; only one can come from standard input.")

    def check_sources(self) -> None:
        check_text_source("task.document", self.document)
        check_text_source("task.query", self.query)

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the one sample."""
        tokenizer = needs_tokenizer(tokenizer, self.name)
        query = read_text("task.query", self.query)
        text = read_text("task.document", self.document)
        document = encode_document(tokenizer, text, allow_special=self.allow_special_tokens)
        yield Sample(
            document_ids=torch.tensor([document.ids]),
            query_ids=torch.tensor([encode_query(tokenizer, document, query)]),
            embedded_ids=torch.tensor([encode_embedded(tokenizer, document, query)]),
            query_position=document.query_position,
            max_new_tokens=self.max_new_tokens,
            generate=self.generate_arguments(),
        )


def needs_tokenizer(tokenizer: Any | None, task: str) -> Any:
    """Return the tokenizer.

    Raises
    ------
    ValueError
        If there is none, as with random weights whose tokenizer is not at hand.
    """
    if tokenizer is None:
        raise ValueError(f"task={task} needs a tokenizer, and none is at hand; set model.tokenizer to where it is.")
    return tokenizer
