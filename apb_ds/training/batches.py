"""What each step trains on: determined by seed, step and rank, so a run that goes on sees what it would have seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apb_ds.tasks.prompts import ONE_TURN_SEPARATOR, encode_document
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.generate import generate
from apb_ds.tasks.synthetic.recipe import Recipe
from apb_ds.training.conversations import Conversation, make_conversation
from apb_ds.training.mixture import Mixture

# Set aside for a question and its answer at first; what they take beyond that, the document is made shorter by.
TURN_TOKENS = 96
# How often that is tried before questions are left out instead.
MAX_FITS = 3
# How many recipes may be too long for a length before that is taken to be so for all of them.
MAX_DRAWS = 200


@dataclass(frozen=True)
class Batch:
    """Conversations of about the same length.

    Attributes
    ----------
    input_ids : (conversations, tokens), int64, on the CPU; padded behind, where no token that counts looks
    is_answer : (conversations, tokens), bool: which tokens the model is to say
    kinds : of the documents
    """

    input_ids: Tensor
    is_answer: Tensor
    kinds: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


@dataclass(frozen=True)
class Lengths:
    """How long documents are in the course of training.

    Attributes
    ----------
    shortest, longest : tokens of a conversation
    growth : share of the steps over which the longest one grows to `longest`; after that, they are drawn evenly
    at_longest : share of the later steps in which they are as long as may be instead
    """

    shortest: int
    longest: int
    growth: float
    at_longest: float = 0.0

    def draw(self, progress: float, draws: Draws) -> int:
        """Return a length; `progress` is the share of the steps that are done."""
        grown = min(1.0, progress / self.growth) if self.growth else 1.0
        limit = self.shortest * (self.longest / self.shortest) ** grown
        if grown == 1.0 and self.at_longest and draws.fraction() < self.at_longest:
            return self.longest
        if grown == 1.0:
            return self.shortest + draws.below(self.longest - self.shortest + 1)
        return int(self.shortest * math.exp(draws.fraction() * math.log(limit / self.shortest)))


class Batches(Dataset[Batch]):
    """The batch of each step.

    Parameters
    ----------
    mixture : what documents are made of
    lengths : how long they are
    tokenizer : transformers tokenizer
    num_steps : in all
    num_tokens : of a batch at most, padding included
    seed : integer; with step and rank it determines a batch
    rank : of this process
    asked_first : share of the conversations in which the first question also stands ahead of the document, as in APB's
        anchor, so that a model knows prompts of both kinds
    """

    def __init__(
        self,
        mixture: Mixture,
        lengths: Lengths,
        tokenizer: Any,
        num_steps: int,
        num_tokens: int,
        *,
        seed: int,
        rank: int = 0,
        asked_first: float = 0.0,
    ) -> None:
        self._mixture = mixture
        self._lengths = lengths
        self._tokenizer = tokenizer
        self._num_steps = num_steps
        self._num_tokens = num_tokens
        self._seed = seed
        self._rank = rank
        self._asked_first = asked_first

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Batch:
        draws = Draws("training", self._seed, step, self._rank)
        length = self._lengths.draw(step / self._num_steps, draws)
        num = max(1, self._num_tokens // length)
        pairs = [self._conversation(draws, f"{self._seed}.{step}.{self._rank}.{index}", length) for index in range(num)]
        return _padded([pair[1] for pair in pairs], tuple(pair[0] for pair in pairs), self._tokenizer.eos_token_id)

    def check(self) -> None:
        """Make a conversation of the shortest length.

        Raises
        ------
        ValueError
            If there is no recipe for one.
        """
        try:
            self._conversation(Draws("training", "check"), "check", self._lengths.shortest)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def _conversation(self, draws: Draws, seed: str, length: int) -> tuple[str, Conversation]:
        asked_first = self._asked_first > 0 and draws.fraction() < self._asked_first
        for attempt in range(MAX_DRAWS):
            recipe = self._mixture.draw(draws)
            made = self._made(recipe, f"{seed}.{attempt}", length, asked_first=asked_first)
            if made is not None:
                return recipe.kind, made
        # By now the other ranks are waiting for this one, so this is no matter of bad input: it ends all of them.
        raise RuntimeError(f"train.mixture has no recipe for {length} tokens; raise train.min_length.")

    def _made(self, recipe: Recipe, seed: str, length: int, *, asked_first: bool) -> Conversation | None:
        """Return a conversation of at most `length` tokens, with all its questions if that can be had."""
        reserved = TURN_TOKENS * recipe.num_questions
        made: Conversation | None = None
        for _ in range(MAX_FITS):
            if reserved >= length:
                break
            try:
                document = generate(recipe, seed, length - reserved, self._length)
            except ValueError:  # this recipe makes no document as short as this
                break
            if asked_first:
                text = f"{document.questions[0].query}{ONE_TURN_SEPARATOR}{document.text}"
                document = replace(document, text=text)
            whole = make_conversation(self._tokenizer, document)
            if whole is not None and len(whole.ids) <= length:
                return whole
            made = make_conversation(self._tokenizer, document, length) or made
            reserved += TURN_TOKENS if whole is None else len(whole.ids) - length
        return made

    def _length(self, text: str) -> int:
        return len(encode_document(self._tokenizer, text).ids)


def _padded(conversations: list[Conversation], kinds: tuple[str, ...], padding_id: int) -> Batch:
    longest = max(len(conversation.ids) for conversation in conversations)
    input_ids = torch.full((len(conversations), longest), padding_id, dtype=torch.int64)
    is_answer = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, conversation in enumerate(conversations):
        input_ids[row, : len(conversation.ids)] = torch.tensor(conversation.ids)
        is_answer[row, : len(conversation.ids)] = torch.tensor(conversation.is_answer)
    return Batch(input_ids, is_answer, kinds)
