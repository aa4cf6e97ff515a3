"""Pass key retrieval (arXiv 2305.16300): a number hidden in filler text."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from apb_ds.config import check_integer
from apb_ds.tasks.base import ConversationConfig, Sample, random_sample, register_task, text_sample
from apb_ds.tasks.checks import as_tuple, check_integers, is_number
from apb_ds.tasks.synthetic.documents import Question, longest
from apb_ds.tasks.synthetic.task import DocumentEncoder

TASK = "There is a pass key hidden in the context. Find it and remember it. I will quiz you about it later. "
FILLER = "The sky is blue. The tree is green. The flower is red. The sun is yellow. "
NEEDLE = "The pass key is {digits}. Remember it. The pass key is {digits}. "
QUERY = "Now, give me the exact number of the pass key."
ANSWER_PREFIX = "The pass key is "
RANDOM_QUERY_TOKENS = 32
RANDOM_DIGITS = "random"
NUM_DIGITS = 12


@register_task
@dataclass(frozen=True)
class PasskeyConfig(ConversationConfig):
    """Documents of fillers that contain a pass key: a grid of lengths and depths.

    Parameters
    ----------
    num_tokens : int or list of int, tokens
        A document's length at most, chat template included; it takes as many fillers as fit.
    depth : float or list of float
        Where the needle is: the share of fillers before it, in [0, 1].
    digits : str
        The key, or ``random``: twelve digits that differ between samples, drawn by the seed.
    num_samples : int
        Samples for each length and depth; more than one needs random digits.
    max_new_tokens : int, tokens
        Length of the answer at most.
    system, template : see `ConversationConfig`
    """

    name: ClassVar[str] = "passkey"
    num_tokens: int | list[int] = 7690
    depth: float | list[float] = 1 / 3
    digits: str = "688435772345"
    num_samples: int = 1
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths, depths = as_tuple(self.num_tokens), as_tuple(self.depth)
        if not lengths or not depths:
            raise ValueError("task.num_tokens and task.depth must be numbers, or lists of at least one.")
        for length in lengths:
            check_integer("task.num_tokens", length, 1)
        for depth in depths:
            if not is_number(depth) or not 0 <= depth <= 1:
                raise ValueError(
                    f"task.depth={depth!r} must be a number in [0, 1]: the share of fillers before the key."
                )
        check_integers(self, num_samples=1, max_new_tokens=1)
        # A number on the command line arrives as one.
        if isinstance(self.digits, int) and not isinstance(self.digits, bool):
            object.__setattr__(self, "digits", str(self.digits))
        is_key = isinstance(self.digits, str) and self.digits.isascii() and self.digits.isdigit()
        if not is_key and self.digits != RANDOM_DIGITS:
            raise ValueError(
                f"task.digits={self.digits!r} must be digits only, such as '688435772345', or {RANDOM_DIGITS}."
            )
        if self.num_samples > 1 and self.digits != RANDOM_DIGITS:
            raise ValueError(
                f"task.num_samples={self.num_samples} with task.digits={self.digits} would repeat the same question; "
                f"set task.digits={RANDOM_DIGITS}."
            )

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the samples, by length, depth and number."""
        for length in as_tuple(self.num_tokens):
            for depth in as_tuple(self.depth):
                for number in range(self.num_samples):
                    # Seeded by its own settings, so that a sample does not depend on the rest of the grid.
                    drawn = random.Random(f"{seed}/{length}/{depth}/{number}")
                    if tokenizer is None:
                        sample_seed = seed if number == 0 else drawn.getrandbits(32)
                        sample = random_sample(
                            length, RANDOM_QUERY_TOKENS, vocab_size, sample_seed, self.max_new_tokens
                        )
                    else:
                        sample = self._sample(tokenizer, length, depth, drawn)
                    yield replace(sample, labels={"length": length, "depth": depth})

    def _sample(self, tokenizer: Any, length: int, depth: float, drawn: random.Random) -> Sample:
        digits = self.digits
        if digits == RANDOM_DIGITS:
            digits = str(drawn.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))
        encoder = DocumentEncoder(tokenizer)
        document = encoder.encode(longest(PasskeyLayout(digits, depth), length, encoder.length).text)
        return text_sample(
            tokenizer, document, QUERY, ANSWER_PREFIX, max_new_tokens=self.max_new_tokens, ground_truth=digits
        )


@dataclass(frozen=True)
class PasskeyLayout:
    """A document with a pass key at a depth. Its units are fillers."""

    digits: str
    depth: float
    minimum: ClassVar[int] = 0
    num_needed: ClassVar[int] = 0

    def text(self, count: int) -> str:
        """Return the text with `count` fillers, the needle after `depth` of them."""
        before = math.floor(self.depth * count)
        return TASK + FILLER * before + NEEDLE.format(digits=self.digits) + FILLER * (count - before)

    def questions(self, count: int) -> tuple[Question, ...]:
        """Return the one question."""
        return (Question(QUERY, ANSWER_PREFIX, (self.digits,)),)
