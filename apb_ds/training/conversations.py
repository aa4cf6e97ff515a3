"""Documents with questions, as conversations with known answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apb_ds.tasks.prompts import ONE_TURN_SEPARATOR, encode_after, encode_document, encode_next_turn, encode_query
from apb_ds.tasks.synthetic.documents import Document, Question
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.generate import generate
from apb_ds.tasks.synthetic.recipe import Recipe
from apb_ds.training.batches import Example
from apb_ds.training.mixture import Mixture

# Room for a question with its answer at first; what they need beyond it is taken from the document.
TURN_TOKENS = 96
# Attempts to make the document shorter before questions are left out instead.
MAX_FITS = 3
# Recipes to draw before a length is said to be too short for all of them.
MAX_DRAWS = 200


class GeneratedConversations:
    """Conversations about generated documents, as `task=synthetic` asks them.

    Parameters
    ----------
    mixture : which documents
    tokenizer : transformers tokenizer
    asked_first : share of the conversations whose first question also precedes the document, as in APB's anchor, so
        that a model knows both kinds of prompt
    """

    name = "instrument"

    def __init__(self, mixture: Mixture, tokenizer: Any, asked_first: float = 0.0) -> None:
        self._mixture = mixture
        self.tokenizer = tokenizer
        self._asked_first = asked_first

    def make(self, seed: str, length: int) -> Example:
        """Return the conversation that a seed determines, see `Source.make`."""
        draws = Draws(self.name, seed)
        asked_first = self._asked_first > 0 and draws.fraction() < self._asked_first
        for attempt in range(MAX_DRAWS):
            recipe = self._mixture.draw(draws)
            made = self._made(recipe, f"{seed}.{attempt}", length, asked_first=asked_first)
            if made is not None:
                return made
        raise ValueError(f"train.mixture has no recipe for {length} tokens; raise train.min_length.")

    def _made(self, recipe: Recipe, seed: str, length: int, *, asked_first: bool) -> Example | None:
        """Return a conversation of at most `length` tokens, with all its questions if possible."""
        reserved = TURN_TOKENS * recipe.num_questions
        made: Example | None = None
        for _ in range(MAX_FITS):
            if reserved >= length:
                break
            try:
                document = generate(recipe, seed, length - reserved, self._length)
            except ValueError:  # too short for this recipe
                break
            if asked_first:
                text = f"{document.questions[0].query}{ONE_TURN_SEPARATOR}{document.text}"
                document = replace(document, text=text)
            whole = make_conversation(self.tokenizer, document, recipe.kind)
            if whole is not None and len(whole.ids) <= length:
                return whole
            made = make_conversation(self.tokenizer, document, recipe.kind, length) or made
            reserved += TURN_TOKENS if whole is None else len(whole.ids) - length
        return made

    def _length(self, text: str) -> int:
        return len(encode_document(self.tokenizer, text).ids)


def make_conversation(tokenizer: Any, document: Document, kind: str, max_tokens: int | None = None) -> Example | None:
    """Return the document with as many of its first questions as fit, by default all; None if none does.

    The first question is asked as in evaluation, the others as further turns. The tokens of the answers are marked;
    each answer ends with the end-of-turn token.
    """
    encoded = encode_document(tokenizer, document.text)
    ids = list(encoded.ids)
    marked: list[int] = []
    last_id: int | None = None
    for question in document.questions:
        if last_id is None:
            asked = encode_query(tokenizer, encoded, question.query, question.answer_prefix)
        else:
            asked = encode_next_turn(tokenizer, question.query, last_id, question.answer_prefix)
        answer = encode_answer(tokenizer, question)
        if max_tokens is not None and len(ids) + len(asked) + len(answer) > max_tokens:
            break
        start = len(ids) + len(asked)
        ids += asked + answer
        marked += range(start, len(ids))
        last_id = answer[-1]
    return Example(ids, len(encoded.ids), marked, kind) if marked else None


def encode_answer(tokenizer: Any, question: Question) -> list[int]:
    """Return the ids of an answer after its prefix, and the end-of-turn token."""
    return [*encode_after(tokenizer, question.answer_prefix, question.continuation), tokenizer.eos_token_id]
