"""Pass key retrieval (arXiv 2305.16300): a number hidden in filler text."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from apb_ds.config import check_integer
from apb_ds.tasks.base import Sample, TaskConfig, random_sample, register_task
from apb_ds.tasks.prompts import EncodedDocument, encode_document, encode_embedded, encode_query

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
class PasskeyConfig(TaskConfig):
    """Documents of fillers with a pass key in them: a grid of lengths and depths.

    Parameters
    ----------
    num_tokens : int or list of int, tokens
        A document's length at most, chat template included; as many fillers are taken as fit.
    depth : float or list of float
        Where the needle is: the share of fillers before it, in [0, 1].
    digits : str
        The key, or ``random``: twelve digits that differ from sample to sample, drawn by the seed.
    num_samples : int
        Samples for each length and depth; several need random digits.
    max_new_tokens : int, tokens
        Length of the answer at most.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field and what is allowed.
    """

    name: ClassVar[str] = "passkey"
    num_tokens: int | list[int] = 7690
    depth: float | list[float] = 1 / 3
    digits: str = "688435772345"
    num_samples: int = 1
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths:
            raise ValueError("task.num_tokens and task.depth must be numbers, or lists with one at least.")
        for length in self.lengths:
            check_integer("task.num_tokens", length, 1)
        for depth in self.depths:
            if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
                raise ValueError(
                    f"task.depth={depth!r} must be a number in [0, 1]: the share of fillers before the key."
                )
        check_integer("task.num_samples", self.num_samples, 1)
        check_integer("task.max_new_tokens", self.max_new_tokens, 1)
        # A number on the command line arrives as one.
        if isinstance(self.digits, int) and not isinstance(self.digits, bool):
            object.__setattr__(self, "digits", str(self.digits))
        is_number = isinstance(self.digits, str) and self.digits.isascii() and self.digits.isdigit()
        if not is_number and self.digits != RANDOM_DIGITS:
            raise ValueError(
                f"task.digits={self.digits!r} must be digits only, such as '688435772345', or {RANDOM_DIGITS}."
            )
        if self.num_samples > 1 and self.digits != RANDOM_DIGITS:
            raise ValueError(
                f"task.num_samples={self.num_samples} with task.digits={self.digits} would ask the same question "
                f"again; set task.digits={RANDOM_DIGITS}."
            )

    @property
    def lengths(self) -> list[int]:
        return list(self.num_tokens) if isinstance(self.num_tokens, (list, tuple)) else [self.num_tokens]

    @property
    def depths(self) -> list[float]:
        return list(self.depth) if isinstance(self.depth, (list, tuple)) else [self.depth]

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the samples, by length, depth and number."""
        for length in self.lengths:
            for depth in self.depths:
                for number in range(self.num_samples):
                    yield self._sample(tokenizer, vocab_size, seed, length, depth, number)

    def _sample(
        self, tokenizer: Any | None, vocab_size: int, seed: int, length: int, depth: float, number: int
    ) -> Sample:
        labels = {"length": length, "depth": depth}
        # A seed of its own, so that a sample does not depend on what else is in the grid.
        drawn = random.Random(f"{seed}/{length}/{depth}/{number}")
        if tokenizer is None:
            sample = random_sample(
                length,
                RANDOM_QUERY_TOKENS,
                vocab_size,
                seed if number == 0 else drawn.getrandbits(32),
                self.max_new_tokens,
            )
            return replace(sample, labels=labels)
        digits = self.digits
        if digits == RANDOM_DIGITS:
            digits = str(drawn.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))
        one = replace(self, num_tokens=length, depth=depth, digits=digits, num_samples=1)
        document = one.longest(tokenizer)
        return Sample(
            document_ids=torch.tensor([document.ids]),
            query_ids=torch.tensor([encode_query(tokenizer, document, QUERY, ANSWER_PREFIX)]),
            embedded_ids=torch.tensor([encode_embedded(tokenizer, document, QUERY)]),
            query_position=document.query_position,
            max_new_tokens=self.max_new_tokens,
            ground_truth=digits,
            labels=labels,
        )

    def document(self, num_fillers: int) -> str:
        """Return the text with `num_fillers` fillers, the needle after `depth` of them; of one length and depth."""
        assert isinstance(self.depth, (int, float))
        before = math.floor(self.depth * num_fillers)
        return TASK + FILLER * before + NEEDLE.format(digits=self.digits) + FILLER * (num_fillers - before)

    def longest(self, tokenizer: Any) -> EncodedDocument:
        """Return the document with as many fillers as fit into `num_tokens`, of one length and depth.

        Raises
        ------
        ValueError
            If not even the document without fillers fits.
        """
        assert isinstance(self.num_tokens, int)
        shortest = len(encode_document(tokenizer, self.document(0)).ids)
        if shortest > self.num_tokens:
            raise ValueError(
                f"task.num_tokens={self.num_tokens} cannot hold the task: without any filler the document has "
                f"{shortest} tokens; raise task.num_tokens."
            )
        # Tokens per filler, measured on many of them: the first estimate is then off by one at most.
        rate = (len(encode_document(tokenizer, self.document(64)).ids) - shortest) / 64
        count = max(0, math.floor((self.num_tokens - shortest) / rate))
        document = encode_document(tokenizer, self.document(count))
        while len(document.ids) > self.num_tokens:
            count -= 1
            document = encode_document(tokenizer, self.document(count))
        while len((longer := encode_document(tokenizer, self.document(count + 1))).ids) <= self.num_tokens:
            count, document = count + 1, longer
        return document
