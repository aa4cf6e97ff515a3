"""A document of a given length, and questions about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# The first estimate of letters per token needs some text to measure.
SAMPLE_UNITS = 64
# Between the texts of one answer. In most tokenizers a space costs no extra token, and benchmarks that ask for several
# texts leave few more tokens than the texts need.
SEPARATOR = " "
# After so many estimates the search halves the gap instead, so that it ends with any tokenizer.
MAX_GUESSES = 8


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes
    ----------
    query : the question
    answer_prefix : how the answer begins; the answers follow after a space
    answers : the wanted texts, in the order in which `continuation` gives them
    """

    query: str
    answer_prefix: str
    answers: tuple[str, ...]

    @property
    def continuation(self) -> str:
        """What a perfect answer says after the prefix."""
        return f" {SEPARATOR.join(self.answers)}."


@dataclass(frozen=True)
class Document:
    """A text and the questions about it."""

    text: str
    questions: tuple[Question, ...]


class Layout(Protocol):
    """A text made of units: sentences, needles or words.

    `text` and `questions` depend only on `count`, not on earlier calls.
    """

    @property
    def minimum(self) -> int:
        """The fewest units with which the task makes sense."""

    @property
    def num_needed(self) -> int:
        """The fewest needles or words of any text, computed without making one."""

    def text(self, count: int) -> str:
        """Return the text with `count` units."""

    def questions(self, count: int) -> tuple[Question, ...]:
        """Return the questions about the text with `count` units."""


def longest(layout: Layout, num_tokens: int, length: Callable[[str], int]) -> Document:
    """Return the document with as many units as fit into `num_tokens`.

    Estimates go by the number of letters and the measured letters per token. So a long text is tokenised about four
    times: for an estimate, its correction, the last unit that fits, and the next one that does not.

    Parameters
    ----------
    length : returns a text's tokens, chat template included

    Raises
    ------
    ValueError
        If not even the fewest units fit.
    """
    # Each has at least one token. Making a text that is far too long, to measure it, would exhaust the memory.
    if layout.num_needed > num_tokens:
        raise ValueError(
            f"task.num_tokens={num_tokens} cannot hold the task: it needs {layout.num_needed} needles or words; raise "
            "task.num_tokens, or ask for less."
        )
    low, high = layout.minimum, None
    text = layout.text(low)
    tokens = length(text)
    if tokens > num_tokens:
        raise ValueError(
            f"task.num_tokens={num_tokens} cannot hold the task: at its shortest the document has {tokens} tokens; "
            "raise task.num_tokens, or ask for less."
        )
    base_letters, base_tokens = len(text), tokens
    guess, guesses = low + SAMPLE_UNITS, 0
    while high is None or high - low > 1:
        text = layout.text(guess)
        tokens = length(text)
        guesses += 1
        if tokens <= num_tokens:
            low = guess
        else:
            high = guess
        letters_per_token = max(1, len(text) - base_letters) / max(1, tokens - base_tokens)
        wanted = len(text) + round((num_tokens - tokens) * letters_per_token)
        guess = _count_of(layout, wanted, low + 1, high)
        if high is not None and guesses > MAX_GUESSES:
            guess = (low + high) // 2
    return Document(layout.text(low), layout.questions(low))


def _count_of(layout: Layout, num_letters: int, low: int, high: int | None) -> int:
    """Return how many units have about `num_letters` letters: at least `low`, below `high`. Tokenises nothing."""
    step = SAMPLE_UNITS
    last = low
    while high is None:
        last += step
        step *= 2
        high = last if len(layout.text(last)) > num_letters else None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(layout.text(middle)) > num_letters else (middle, high)
    return low
