"""One question about one document, both given by the user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from apb_ds.config import check_bool
from apb_ds.tasks.answering import AnsweringConfig
from apb_ds.tasks.base import Sample, needs_tokenizer, register_task, text_sample
from apb_ds.tasks.prompts import encode_document
from apb_ds.tasks.text import STANDARD_INPUT, check_text, check_text_source, read_text


@register_task
@dataclass(frozen=True)
class PromptConfig(AnsweringConfig):
    """A document and a query.

    Parameters
    ----------
    document, query : str
        The text, ``@FILE`` for a file's contents, or ``-`` for standard input (at most one of the two).
    stream : bool
        Whether the answer is printed as it is generated.
    max_new_tokens and so on : see `AnsweringConfig`
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
        super().check_sources()
        check_text_source("task.document", self.document)
        check_text_source("task.query", self.query)

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the one sample."""
        tokenizer = needs_tokenizer(tokenizer, self.name)
        query = read_text("task.query", self.query)
        text = read_text("task.document", self.document)
        document = encode_document(tokenizer, text, allow_special=self.allow_special_tokens)
        arguments = self.generate_arguments()
        yield text_sample(tokenizer, document, query, max_new_tokens=self.max_new_tokens, generate=arguments)
