"""Where a prompt is cut into a document and its question: one rule, for the server's prompts and the engine's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apb_ds.config import check_integer

MIN_DOCUMENT = 2048
SPLIT_TEXT = "\n\n"
# Where a text without the split text is cut: before its last line, else so many characters from its end.
LINE = "\n"
LAST_CHARACTERS = 1000
LAST_IDS = 256  # the same for ids without a tokenizer
# A control token among the last ids closes the question; what follows it opens the answer.
OPENING_IDS = 16


def question_places(text: str, split: str) -> list[int]:
    """Return where a text's question may begin, in characters, the best place first: one with a short rest is taken.

    Parameters
    ----------
    split : before whose last occurrence a text is cut, if it has one
    """
    stripped = text.rstrip()
    last = max(0, len(stripped) - LAST_CHARACTERS)
    last = max(last, stripped.find(" ", last, last + LAST_CHARACTERS // 2))
    return [place for place in (stripped.rfind(split), stripped.rfind(LINE)) if place > 0] + [last]


def document_length(num_ids: int, min_document: int, last_ids: int = LAST_IDS) -> int:
    """Return how many of a prompt's ids are its document, if only their number is known; 0 for none."""
    length = num_ids - last_ids
    return length if length >= min_document else 0


@dataclass(frozen=True)
class Split:
    """How `APBEngine.generate` cuts a prompt of which it is not told how long the query is.

    Parameters
    ----------
    tokenizer : the model's
        With it, the cut is before the prompt's last `text`, if fewer than `min_document` tokens follow; else before its
        last line, else a thousand characters before its end.
    text : an empty line by default; needs the tokenizer
    last_ids : without a tokenizer, how many ids at the end are the query; 256 by default
    min_document : tokens that a document has at least; a prompt whose beginning is shorter has none, and runs exact

    Raises
    ------
    ValueError
        For a value out of its range, or one that the others exclude.
    """

    tokenizer: Any = None
    text: str | None = None
    last_ids: int | None = None
    min_document: int = MIN_DOCUMENT

    def __post_init__(self) -> None:
        check_integer("split: min_document", self.min_document, 1)
        if self.last_ids is not None:
            check_integer("split: last_ids", self.last_ids, 1)
        if self.text is not None and (not isinstance(self.text, str) or not self.text):
            raise ValueError(f"split: text={self.text!r} must be a text that is not empty.")
        if self.tokenizer is None and self.text is not None:
            raise ValueError("split: text needs tokenizer=..., since prompts are ids; or give last_ids.")
        if self.tokenizer is not None and self.last_ids is not None:
            raise ValueError("split: last_ids and tokenizer exclude each other.")
        if self.tokenizer is not None and not hasattr(self.tokenizer, "all_special_ids"):
            raise ValueError(f"split: tokenizer={type(self.tokenizer).__name__} must be a transformers tokenizer.")

    @classmethod
    def of(cls, given: Split | Mapping[str, Any] | None) -> Split:
        """Return what was given, or made of a mapping of its fields, or all defaults."""
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"split={given!r} must be an apb_ds.Split or a mapping of its fields.")
        fields = cls.__dataclass_fields__
        if unknown := [name for name in given or {} if name not in fields]:
            raise ValueError(f"split: {unknown[0]} is unknown; it has {', '.join(fields)}.")
        return cls(**(given or {}))

    def document_length(self, ids: list[int]) -> int:
        """Return how many of a prompt's ids are its document, 0 for none."""
        if self.tokenizer is None:
            return document_length(len(ids), self.min_document, self.last_ids or LAST_IDS)
        end = len(ids) - self._opening_length(ids)
        # No place is further from the end: a question that begins before would be too long.
        last_ids = ids[max(0, end - max(self.min_document, LAST_CHARACTERS)) : end]
        *places, last = question_places(self._text_of(last_ids), self.text or SPLIT_TEXT)
        lengths = (self._question_length(last_ids, place) for place in places)
        length = next((length for length in lengths if length < self.min_document), None)
        num_before = end - (self._question_length(last_ids, last) if length is None else length)
        return num_before if num_before >= self.min_document else 0

    def _question_length(self, ids: list[int], place: int) -> int:
        """Return how many of the last ids hold all of their text from a place on; the first may hold more."""
        num_characters = len(self._text_of(ids)) - place
        lengths = range(len(ids) + 1)
        return bisect_left(lengths, num_characters, key=lambda length: len(self._text_of(ids[len(ids) - length :])))

    def _opening_length(self, ids: list[int]) -> int:
        """Return how many ids close the question and open the answer, as a chat template does."""
        special, last = set(self.tokenizer.all_special_ids), ids[-OPENING_IDS:]
        return next((len(last) - index for index, token in enumerate(last) if token in special), 0)

    def _text_of(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
