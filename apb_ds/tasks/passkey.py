"""Pass key retrieval (arXiv 2305.16300): a number hidden in filler text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from apb_ds.config import check_integer
from apb_ds.tasks.base import Sample, TaskConfig, random_sample, register_task
from apb_ds.tasks.prompts import EncodedDocument, encode_document, encode_query

TASK = "There is a pass key hidden in the context. Find it and remember it. I will quiz you about it later. "
FILLER = "The sky is blue. The tree is green. The flower is red. The sun is yellow. "
NEEDLE = "The pass key is {digits}. Remember it. The pass key is {digits}. "
QUERY = "Now, give me the exact number of the pass key."
ANSWER_PREFIX = "The pass key is "
RANDOM_QUERY_TOKENS = 32


@register_task
@dataclass(frozen=True)
class PasskeyConfig(TaskConfig):
    """A document of fillers with a pass key in it.

    Parameters
    ----------
    num_tokens : int, tokens
        The document's length at most, chat template included; as many fillers are taken as fit.
    depth : float
        Where the needle is: the share of fillers before it, in [0, 1].
    digits : str
        The key.
    max_new_tokens : int, tokens
        Length of the answer at most.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field and what is allowed.
    """

    name: ClassVar[str] = "passkey"
    num_tokens: int = 7690
    depth: float = 1 / 3
    digits: str = "688435772345"
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        check_integer("task.num_tokens", self.num_tokens, 1)
        check_integer("task.max_new_tokens", self.max_new_tokens, 1)
        depth = self.depth
        if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
            raise ValueError(f"task.depth={depth!r} must be a number in [0, 1]: the share of fillers before the key.")
        # A number on the command line arrives as one.
        if isinstance(self.digits, int) and not isinstance(self.digits, bool):
            object.__setattr__(self, "digits", str(self.digits))
        if not isinstance(self.digits, str) or not (self.digits.isascii() and self.digits.isdigit()):
            raise ValueError(f"task.digits={self.digits!r} must be digits only, such as '688435772345'.")

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield the one sample."""
        if tokenizer is None:
            yield random_sample(self.num_tokens, RANDOM_QUERY_TOKENS, vocab_size, seed, self.max_new_tokens)
            return
        document = self.longest(tokenizer)
        yield Sample(
            document_ids=torch.tensor([document.ids]),
            query_ids=torch.tensor([encode_query(tokenizer, document, QUERY, ANSWER_PREFIX)]),
            query_position=document.query_position,
            max_new_tokens=self.max_new_tokens,
            ground_truth=self.digits,
        )

    def document(self, num_fillers: int) -> str:
        """Return the text with `num_fillers` fillers, the needle after `depth` of them."""
        before = math.floor(self.depth * num_fillers)
        return TASK + FILLER * before + NEEDLE.format(digits=self.digits) + FILLER * (num_fillers - before)

    def longest(self, tokenizer: Any) -> EncodedDocument:
        """Return the document with as many fillers as fit into `num_tokens`.

        Raises
        ------
        ValueError
            If not even the document without fillers fits.
        """
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
