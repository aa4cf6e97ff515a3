"""Document and query of a prompt as ids, in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apb_ds.tasks.prompts import encode_document, encode_query


@dataclass(frozen=True)
class SplitPrompt:
    """Document and query as ids, and how many document tokens precede the user's text."""

    document_ids: list[int]
    query_ids: list[int]
    query_position: int


def split_prompt(tokenizer: Any, document: str, query: str, answer_prefix: str = "") -> SplitPrompt:
    """Return document and query as ids; the answer begins with `answer_prefix`."""
    encoded = encode_document(tokenizer, document)
    return SplitPrompt(encoded.ids, encode_query(tokenizer, encoded, query, answer_prefix), encoded.query_position)
