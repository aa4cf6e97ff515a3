"""A conversation about one document: questions from standard input, line by line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb_ds.config import check_bool, check_integer
from apb_ds.tasks.answering import AnsweringConfig
from apb_ds.tasks.base import register_task
from apb_ds.tasks.text import STANDARD_INPUT, check_text, check_text_source


@register_task
@dataclass(frozen=True)
class ChatConfig(AnsweringConfig):
    """A document that is prefilled once, and questions about it.

    Parameters
    ----------
    document : str
        The text, or ``@FILE`` for a file's contents. Standard input is for the questions.
    query : str, optional
        The first question, text or ``@FILE``; the anchor embeds it. Without one the anchor is the document's start.
    stream : bool
        Whether answers are printed as they are generated. Default true.
    turn_tokens : int, tokens
        Positions reserved for all turns together, for models whose rotary frequencies depend on the length.
    max_new_tokens and so on : for each answer, see `AnsweringConfig`
    """

    name: ClassVar[str] = "chat"
    document: str = ""
    query: str | None = None
    stream: bool = True
    turn_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("document", "query"):
            if field == "document" or self.query is not None:
                object.__setattr__(self, field, check_text(f"task.{field}", getattr(self, field)))
            if getattr(self, field) == STANDARD_INPUT:
                raise ValueError(f"task.{field}=-: the questions come from standard input; give a text or @FILE.")
        check_bool("task.stream", self.stream)
        check_integer("task.turn_tokens", self.turn_tokens, 1)

    def check_sources(self) -> None:
        super().check_sources()
        check_text_source("task.document", self.document)
        if self.query is not None:
            check_text_source("task.query", self.query)
