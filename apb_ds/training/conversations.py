"""Documents with their questions as conversations whose answers are known: what a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apb_ds.tasks.prompts import encode_after, encode_document, encode_next_turn, encode_query
from apb_ds.tasks.synthetic.documents import Document, Question


@dataclass(frozen=True)
class Conversation:
    """A document, questions about it and their answers, as one sequence of ids.

    Attributes
    ----------
    ids : tokens
    is_answer : for each of them, whether the model is to say it
    num_document : the first so many of them are the document
    """

    ids: list[int]
    is_answer: list[bool]
    num_document: int

    @property
    def num_answer_tokens(self) -> int:
        return sum(self.is_answer)


def make_conversation(tokenizer: Any, document: Document, max_tokens: int | None = None) -> Conversation | None:
    """Return the document with as many of its questions, in their order, as fit, by default all; None if not one does.

    The first question comes as evaluation asks it, the others as further turns. Every answer ends with the token that
    ends a turn, which the model is to say as well.
    """
    encoded = encode_document(tokenizer, document.text)
    ids, is_answer = list(encoded.ids), [False] * len(encoded.ids)
    last_id: int | None = None
    for question in document.questions:
        if last_id is None:
            asked = encode_query(tokenizer, encoded, question.query, question.answer_prefix)
        else:
            asked = encode_next_turn(tokenizer, question.query, last_id, question.answer_prefix)
        answer = encode_answer(tokenizer, question)
        if max_tokens is not None and len(ids) + len(asked) + len(answer) > max_tokens:
            break
        ids += asked + answer
        is_answer += [False] * len(asked) + [True] * len(answer)
        last_id = answer[-1]
    return None if last_id is None else Conversation(ids, is_answer, len(encoded.ids))


def encode_answer(tokenizer: Any, question: Question) -> list[int]:
    """Return the ids of a question's answer behind its prefix, the end-of-turn token last."""
    return [*encode_after(tokenizer, question.answer_prefix, question.continuation), tokenizer.eos_token_id]
