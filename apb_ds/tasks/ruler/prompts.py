"""RULER's prompts as document and query, and how many tokens they take.

The harness makes one text, the prompt, and a prefix that opens the answer. The query is the question at its end:

=============  ====================================================================================================
niah tasks     the last line, ``What is/are all the special magic ... mentioned in the provided text?``
vt, cwe, fwe   the last line, ``Question: ...``
qa tasks       from the second ``Answer the question based on the given documents. ...`` on, with ``Question: ...``
=============  ====================================================================================================

Everything before it, the first instruction included, is the document. A model with a chat template gets both as
turns, with the prefix at the beginning of its own; any other gets the harness' text to the letter.
"""

from __future__ import annotations

from typing import Any

import torch

from apb_ds.tasks.base import Sample
from apb_ds.tasks.control import mask
from apb_ds.tasks.prompts import encode_after, encode_document, encode_embedded, encode_query, encode_text, has_template
from apb_ds.tasks.ruler.names import QUESTION_FILES

QUESTION_INSTRUCTION = "Answer the question based on the given documents."
# Tokens by which pieces of a text may outnumber the whole.
SLACK = 16
# The example in front of a variable tracking prompt gets other names after it was counted: each of 5 three-letter
# names is there about three times, and may take two tokens more.
RENAMING_SLACK = 32
# How often a generator may try a prompt that is too long before it is told that it fits: some would try for ever.
PATIENCE = 64


def split_text(task: str, text: str) -> tuple[str, str]:
    """Return document and query; joined, they are `text`."""
    start = text.rindex(QUESTION_INSTRUCTION) if task in QUESTION_FILES else text.rindex("\n") + 1
    return text[:start], text[start:]


def make_sample(tokenizer: Any, task: str, made: dict[str, Any], delimiter: str, max_new_tokens: int) -> Sample:
    """Return a sample of what the harness made.

    Parameters
    ----------
    made : ``input``, the prompt; ``gen_prefix``, which opens the answer; ``outputs``, the references
    delimiter : what the harness puts between the two for a model without a chat template
    """
    document, query = split_text(task, made["input"])
    prefix = made["gen_prefix"]
    encoded = encode_document(tokenizer, document)
    if has_template(tokenizer):
        query_ids = encode_query(tokenizer, encoded, query, prefix)
    else:
        query_ids = encode_after(tokenizer, encoded.end, mask(tokenizer, query + delimiter + prefix))
    answers = tuple(made["outputs"])
    return Sample(
        document_ids=torch.tensor([encoded.ids]),
        query_ids=torch.tensor([query_ids]),
        embedded_ids=torch.tensor([encode_embedded(tokenizer, encoded, query)]),
        query_position=encoded.query_position,
        max_new_tokens=max_new_tokens,
        ground_truth=", ".join(answers),
        answers=answers,
        labels={"task": task},
    )


class PromptCounter:
    """Stands in for a tokenizer where the harness fits a prompt into a length: counts what the prompt will take here.

    Parameters
    ----------
    tokenizer : the model's
    task : str
    max_new_tokens : int, tokens
    length : int, tokens
        What prompt and answer have to fit into.
    """

    def __init__(self, tokenizer: Any, task: str, max_new_tokens: int, length: int) -> None:
        self._tokenizer = tokenizer
        self._task = task
        empty = encode_document(tokenizer, "a")
        template = len(empty.ids) + len(encode_query(tokenizer, empty, "a")) - 2
        self._reserve = template + SLACK + (RENAMING_SLACK if task == "ruler_vt" else 0)
        # The one generator that leaves no room for the answer itself.
        counts_answer = task != "ruler_fwe"
        self._reserve += 0 if counts_answer else max_new_tokens
        self._limit = length - max_new_tokens if counts_answer else length
        self._num_too_long = 0

    @property
    def gave_up(self) -> bool:
        """Whether nothing that was tried fitted."""
        return self._num_too_long >= PATIENCE

    def __call__(self, text: str) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": range(0 if self.gave_up else self._count(text))})

    def set_apart(self, num_tokens: int) -> None:
        """Take tokens off what a prompt may have, for a text that the harness counts on its own."""
        self._limit -= num_tokens

    def fits(self, text: str) -> bool:
        """Return whether a prompt leaves room for the answer."""
        return self._count(text) <= self._limit

    def count_plain(self, text: str) -> Any:
        """Count a text that is no prompt of its own."""
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": range(len(encode_text(self._tokenizer, text)))})

    def _count(self, text: str) -> int:
        num_tokens = len(encode_text(self._tokenizer, text)) + self._reserve
        if self._task.startswith("niah"):
            # The prefix repeats the question, in words that are no longer.
            num_tokens += len(encode_text(self._tokenizer, text[text.rindex("\n") + 1 :]))
        elif self._task in QUESTION_FILES:
            num_tokens += SLACK
        self._num_too_long = self._num_too_long + 1 if num_tokens > self._limit else 0
        return num_tokens
