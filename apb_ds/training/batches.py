"""What each step trains on. Seed, step and rank determine it, so that a resumed run sees the same batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apb_ds.tasks.synthetic.draws import Draws


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes
    ----------
    ids : token ids
    num_document : number of tokens, from the first, that are the document
    marked : ascending positions of the tokens that count: those the model learns to say, or whose attention is a label
    kind : of the conversation, for the log
    """

    ids: list[int]
    num_document: int
    marked: list[int]
    kind: str


@dataclass(frozen=True)
class Batch:
    """Conversations of about the same length, on the CPU.

    Attributes
    ----------
    input_ids : (conversations, tokens), int64, padded at the end, where no token that counts looks
    is_marked : (conversations, tokens), bool, see `Example.marked`
    num_document : (conversations,), int64
    kinds : one per conversation
    """

    input_ids: Tensor
    is_marked: Tensor
    num_document: Tensor
    kinds: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


def pad_examples(examples: Sequence[Example], padding_id: int) -> Batch:
    """Return conversations as one batch."""
    width = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), width), padding_id, dtype=torch.int64)
    is_marked = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.ids)] = torch.tensor(example.ids)
        is_marked[row, example.marked] = True
    num_document = torch.tensor([example.num_document for example in examples])
    return Batch(input_ids, is_marked, num_document, tuple(example.kind for example in examples))


@dataclass(frozen=True)
class Lengths:
    """How long conversations are in the course of training.

    Attributes
    ----------
    shortest, longest : tokens
    growth : share of the steps over which the maximum grows to `longest`; after that, lengths are uniform
    at_longest : share of the later steps with conversations of the `longest` length instead
    """

    shortest: int
    longest: int
    growth: float
    at_longest: float = 0.0

    def draw(self, progress: float, draws: Draws) -> int:
        """Return a length; `progress` is the share of completed steps."""
        grown = min(1.0, progress / self.growth) if self.growth else 1.0
        limit = self.shortest * (self.longest / self.shortest) ** grown
        if grown == 1.0 and self.at_longest and draws.fraction() < self.at_longest:
            return self.longest
        if grown == 1.0:
            return self.shortest + draws.below(self.longest - self.shortest + 1)
        return int(self.shortest * math.exp(draws.fraction() * math.log(limit / self.shortest)))


class Source(Protocol):
    """Generates conversations.

    Attributes
    ----------
    name : seeds the choices, together with the seed of each
    tokenizer : transformers tokenizer
    """

    name: str
    tokenizer: Any

    def make(self, seed: str, length: int) -> Example:
        """Return the conversation that a seed determines, of about `length` tokens and no more.

        Raises
        ------
        ValueError
            If `length` is too short for any conversation.
        """


class Batches(Dataset[Batch]):
    """The batch of each step.

    Parameters
    ----------
    source, lengths : what conversations are, and how long
    num_steps : of the whole training
    num_tokens : maximum of a batch, unless one conversation has more
    seed : integer; determines a batch together with step and rank
    rank : of this process
    """

    def __init__(
        self,
        source: Source,
        lengths: Lengths,
        num_steps: int,
        num_tokens: int,
        *,
        seed: int,
        rank: int = 0,
    ) -> None:
        self._source = source
        self._lengths = lengths
        self._num_steps = num_steps
        self._num_tokens = num_tokens
        self._seed = seed
        self._rank = rank

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Batch:
        place = f"{self._seed}.{step}.{self._rank}"
        length = self._lengths.draw(step / self._num_steps, Draws(self._source.name, "length", place))
        num = max(1, self._num_tokens // length)
        try:
            examples = [self._source.make(f"{place}.{index}", length) for index in range(num)]
        except ValueError as error:
            # The other ranks are waiting for this one by now, so all have to end: that is not a ValueError's job.
            raise RuntimeError(str(error)) from error
        return pad_examples(examples, self._source.tokenizer.eos_token_id)
