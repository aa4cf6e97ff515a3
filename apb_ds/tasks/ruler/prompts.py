"""RULER's prompts as document and query, and how many tokens they take.

The harness makes one text, the prompt, and a prefix that opens the answer. The query is the question at its end:

=============  ====================================================================================================
niah tasks     the last line, ``What is/are all the special magic ... mentioned in the provided text?``
vt, cwe, fwe   the last line, ``Question: ...``
qa tasks       from the second ``Answer the question based on the given documents. ...`` on, with ``Question: ...``
=============  ====================================================================================================

Everything before it, the first instruction included, is the document. A model with a chat template gets both as turns,
with the prefix at the beginning of its own turn; any other gets the harness's exact text.
"""

from __future__ import annotations

from typing import Any

from apb_ds.tasks.base import Sample, text_sample
from apb_ds.tasks.prompts import encode_document, encode_query, encode_text
from apb_ds.tasks.ruler.names import QUESTION_FILES

QUESTION_INSTRUCTION = "Answer the question based on the given documents."
# How many tokens the parts of a text may have more than the whole.
SLACK = 16
# Variable tracking renames the example before the prompt after it was counted: each of 5 three-letter names occurs
# about three times, and may take two tokens more.
RENAMING_SLACK = 32
# How many prompts that are too long a generator may try in a row before it is told that one fits: some would never end.
PATIENCE = 64


def split_text(task: str, text: str) -> tuple[str, str]:
    """Return document and query; joined, they are `text`."""
    start = text.rindex(QUESTION_INSTRUCTION) if task in QUESTION_FILES else text.rindex("\n") + 1
    return text[:start], text[start:]


def make_sample(tokenizer: Any, task: str, made: dict[str, Any], delimiter: str, max_new_tokens: int) -> Sample:
    """Return a sample from what the harness made.

    Parameters
    ----------
    made : ``input``, the prompt; ``gen_prefix``, which opens the answer; ``outputs``, the references
    delimiter : what the harness puts between the two without a chat template
    """
    document, query = split_text(task, made["input"])
    prefix, answers = made["gen_prefix"], tuple(made["outputs"])
    return text_sample(
        tokenizer,
        encode_document(tokenizer, document),
        query,
        prefix,
        untemplated=query + delimiter + prefix,
        max_new_tokens=max_new_tokens,
        ground_truth=", ".join(answers),
        answers=answers,
        labels={"task": task},
    )


class PromptCounter:
    """Replaces the tokenizer while the harness fits a prompt into a length: counts the tokens that it will take here.

    Parameters
    ----------
    tokenizer : the model's
    task : str
    max_new_tokens : int, tokens
    length : int, tokens
        What prompt and answer must fit into.
    """

    def __init__(self, tokenizer: Any, task: str, max_new_tokens: int, length: int) -> None:
        self._tokenizer = tokenizer
        self._task = task
        empty = encode_document(tokenizer, "a")
        template = len(empty.ids) + len(encode_query(tokenizer, empty, "a")) - 2
        self._reserve = template + SLACK + (RENAMING_SLACK if task == "ruler_vt" else 0)
        # The only generator that does not count the answer itself.
        counts_answer = task != "ruler_fwe"
        self._reserve += 0 if counts_answer else max_new_tokens
        self._limit = length - max_new_tokens if counts_answer else length
        self._num_too_long = 0

    @property
    def gave_up(self) -> bool:
        """Whether none of the prompts tried last fitted."""
        return self._num_too_long >= PATIENCE

    def __call__(self, text: str) -> Any:
        return _encoding(0 if self.gave_up else self._count(text))

    def set_apart(self, num_tokens: int) -> None:
        """Reduce a prompt's limit, for a text that the harness counts separately."""
        self._limit -= num_tokens

    def fits(self, text: str) -> bool:
        """Return whether a prompt leaves room for the answer."""
        return self._count(text) <= self._limit

    def count_plain(self, text: str) -> Any:
        """Count a text that is not a whole prompt."""
        return _encoding(len(encode_text(self._tokenizer, text)))

    def _count(self, text: str) -> int:
        num_tokens = len(encode_text(self._tokenizer, text)) + self._reserve
        if self._task.startswith("niah"):
            # The prefix repeats the question, in words that are no longer than it.
            num_tokens += len(encode_text(self._tokenizer, text[text.rindex("\n") + 1 :]))
        elif self._task in QUESTION_FILES:
            num_tokens += SLACK
        self._num_too_long = self._num_too_long + 1 if num_tokens > self._limit else 0
        return num_tokens


def _encoding(num_tokens: int) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": range(num_tokens)})
