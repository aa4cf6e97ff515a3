"""A document of a wanted length, and questions about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# A first guess at letters per token needs some text to measure; more of it makes the guess better.
SAMPLE_UNITS = 64
# Between the texts of one answer. A blank costs no token of its own in most tokenizers, and benchmarks that ask for
# several texts leave hardly more tokens than these take.
SEPARATOR = " "
# After so many guesses the gap is halved instead, so that the search ends whatever the tokenizer does.
MAX_GUESSES = 8


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes
    ----------
    query : what is asked
    answer_prefix : how the answer begins; what is wanted follows after a space
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
    """A text that grows by units: sentences, needles or words.

    Both functions depend on `count` alone, not on what was asked for before.
    """

    @property
    def minimum(self) -> int:
        """With how many units the task makes sense at least."""

    @property
    def num_needed(self) -> int:
        """How many needles or words every text has at least; told without making one."""

    def text(self, count: int) -> str:
        """Return the text with `count` units."""

    def questions(self, count: int) -> tuple[Question, ...]:
        """Return the questions about the text with `count` units."""


def longest(layout: Layout, num_tokens: int, length: Callable[[str], int]) -> Document:
    """Return the document with as many units as fit into `num_tokens`.

    A guess goes by the number of letters, and how many make a token is measured. So a long text is tokenised about
    four times: for a guess, to mend it, to reach the last unit, and to see that one more does not fit.

    Parameters
    ----------
    length : the number of tokens of a text, and of whatever the chat template puts around it

    Raises
    ------
    ValueError
        If not even the fewest units fit.
    """
    # None of them has less than a token. A text that is far too long would take all memory to be measured.
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
    """Return how many units have about `num_letters` letters: at least `low`, below `high`. Nothing is tokenised."""
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
