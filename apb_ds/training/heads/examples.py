"""What heads are trained on: conversations over long documents, determined by seed, step and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apb_ds.tasks.prompts import encode, encode_document, has_template
from apb_ds.tasks.synthetic.documents import Document, longest
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.generate import generate
from apb_ds.tasks.synthetic.recipe import KINDS, NEEDLES
from apb_ds.training.batches import MAX_DRAWS, TURN_TOKENS, Lengths
from apb_ds.training.conversations import make_conversation
from apb_ds.training.heads.layouts import QuoteLayout, TextNeedles
from apb_ds.training.heads.sharegpt import ShareGPT
from apb_ds.training.heads.texts import TextFiller
from apb_ds.training.mixture import Mixture

ANSWER = "answer"
LATER = "later"
OBSERVERS = (ANSWER, LATER)
# Room for the question and the answer of `quote`, whose passages are long.
QUOTE_TOKENS = 700
CONTINUED_TOKENS = 128
MAX_ANSWER_TOKENS = 1024


@dataclass(frozen=True)
class HeadExample:
    """One conversation.

    Attributes
    ----------
    ids : tokens
    num_document : the first so many are the document, whose tokens are scored
    observers : ascending positions of the tokens whose attention to the document counts
    kind : of the conversation, for the log
    """

    ids: list[int]
    num_document: int
    observers: list[int]
    kind: str


@dataclass(frozen=True)
class HeadBatch:
    """Conversations, padded behind; see `HeadsLoss.forward`. On the CPU."""

    input_ids: Tensor
    is_observer: Tensor
    num_document: Tensor
    kinds: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


def pad_examples(examples: Sequence[HeadExample], padding_id: int) -> HeadBatch:
    """Return conversations as one batch."""
    width = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), width), padding_id, dtype=torch.int64)
    is_observer = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.ids)] = torch.tensor(example.ids)
        is_observer[row, example.observers] = True
    num_document = torch.tensor([example.num_document for example in examples])
    return HeadBatch(input_ids, is_observer, num_document, tuple(example.kind for example in examples))


@dataclass(frozen=True)
class Sources:
    """Where conversations come from, and how often.

    Attributes
    ----------
    mixture : recipes of made-up documents, for what the shares below leave
    files : real texts
    text_share : how often the filler of a made-up document is real text
    quote_share : of conversations in which a passage of real text is to be quoted
    continue_share : of real texts that simply go on
    data : conversations of a user, or None
    data_share : how often one of those is taken, before anything else is
    """

    mixture: Mixture
    files: Sequence[Path]
    text_share: float
    quote_share: float
    continue_share: float
    data: ShareGPT | None
    data_share: float


@dataclass(frozen=True)
class Observing:
    """Whose attention counts.

    Attributes
    ----------
    observers : ``answer``: the tokens of the answers. ``later``: tokens drawn from the whole conversation.
    num_observers : the most there are; of more, as many are drawn
    """

    observers: str
    num_observers: int

    def draw(self, is_answer: Sequence[bool], draws: Draws) -> list[int]:
        """Return the observers among a conversation's tokens, in their order."""
        if self.observers == ANSWER:
            among = [place for place, answers in enumerate(is_answer) if answers]
        else:
            among = list(range(1, len(is_answer)))
        if len(among) <= self.num_observers:
            return among
        # The last token sees the whole document, so nothing of it is without an observer.
        drawn = draws.sample(len(among) - 1, self.num_observers - 1)
        return sorted(among[place] for place in (*drawn, len(among) - 1))


class ExampleMaker:
    """Makes conversations.

    Parameters
    ----------
    sources : Sources
    observing : Observing
    tokenizer : transformers tokenizer
    held_out : whether the conversations of `sources.data` are those to measure on
    """

    def __init__(self, sources: Sources, observing: Observing, tokenizer: Any, *, held_out: bool = False) -> None:
        self._sources = sources
        self._observing = observing
        self._tokenizer = tokenizer
        self._lines = None if sources.data is None else sources.data.indices(held_out=held_out)

    def make(self, seed: str, length: int) -> HeadExample:
        """Return the conversation that a seed stands for, of about `length` tokens and no more.

        Raises
        ------
        ValueError
            If nothing as short as that can be made.
        """
        draws = Draws("heads", seed)
        example = self._whole(draws, seed, length)
        answers = set(example.observers)
        observers = self._observing.draw([place in answers for place in range(len(example.ids))], draws)
        return replace(example, observers=observers)

    def _whole(self, draws: Draws, seed: str, length: int) -> HeadExample:
        """Return a conversation with all tokens of its answers as observers."""
        if self._sources.data is not None and draws.fraction() < self._sources.data_share:
            return self._given(draws, length)
        for attempt in range(MAX_DRAWS):
            try:
                example = self._made_up(draws, f"{seed}.{attempt}", length)
            except ValueError:  # this recipe makes nothing as short as this; another one may
                continue
            if example is not None:
                return example
        raise ValueError(f"nothing can be made in {length} tokens; raise train.min_length.")

    def _made_up(self, draws: Draws, seed: str, length: int) -> HeadExample | None:
        """Return a conversation of a kind that is drawn; None if it does not fit."""
        sources = self._sources
        drawn = draws.fraction()
        if drawn < sources.continue_share:
            return self._continued(draws, length)
        if drawn < sources.continue_share + sources.quote_share:
            quote = QuoteLayout(TextFiller(sources.files, draws), draws.fraction())
            return self._conversation(longest(quote, length - QUOTE_TOKENS, self._length), "quote", length)
        recipe = sources.mixture.draw(draws)
        room = length - TURN_TOKENS * recipe.num_questions
        if room < TURN_TOKENS:
            return None
        if KINDS[recipe.kind].fillers and recipe.filler_used != NEEDLES and draws.fraction() < sources.text_share:
            needles = TextNeedles(recipe, (recipe.split, recipe.kind, seed, room), TextFiller(sources.files, draws))
            document = longest(needles, room, self._length)
        else:
            document = generate(recipe, seed, room, self._length)
        return self._conversation(document, recipe.kind, length)

    def _length(self, text: str) -> int:
        return len(encode_document(self._tokenizer, text).ids)

    def _conversation(self, document: Document, kind: str, length: int) -> HeadExample | None:
        made = make_conversation(self._tokenizer, document, length)
        if made is None:
            return None
        answers = [place for place, answers in enumerate(made.is_answer) if answers]
        return HeadExample(made.ids, made.num_document, answers, kind)

    def _continued(self, draws: Draws, length: int) -> HeadExample:
        """Return real text as it stands; its last tokens are the answer."""
        filler, num = TextFiller(self._sources.files, draws), 16
        ids: list[int] = []
        while len(ids) < length:
            ids = encode(self._tokenizer, "".join(filler.sentences(num)))
            num *= 2
        num_answer = min(CONTINUED_TOKENS, length // 4)
        return HeadExample(ids[:length], length - num_answer, list(range(length - num_answer, length)), "continue")

    def _given(self, draws: Draws, length: int) -> HeadExample:
        """Return a conversation of the user's; what is too long loses its middle, as long prompts do in training."""
        data = self._sources.data
        assert data is not None and self._lines is not None
        prompt, answer = data.pair(draws.choose(self._lines))
        ids = encode_prompt(self._tokenizer, prompt)
        answer_ids = [*encode(self._tokenizer, answer), self._tokenizer.eos_token_id]
        answer_ids = answer_ids[: min(MAX_ANSWER_TOKENS, length // 2)]
        room = length - len(answer_ids)
        if len(ids) > room:
            ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
        return HeadExample(ids + answer_ids, len(ids), list(range(len(ids), len(ids) + len(answer_ids))), "given")


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a user's turn with the answer opened; without a chat template, of the text and a new line."""
    if not has_template(tokenizer):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + encode(tokenizer, f"{prompt}\n")
    turn = [{"role": "user", "content": prompt}]
    return encode(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


class HeadExamples(Dataset[HeadBatch]):
    """The batch of each step.

    Parameters
    ----------
    maker : ExampleMaker
    lengths : how long conversations are
    num_steps : in all
    num_tokens : of a batch at most, unless one conversation has more
    padding_id : token id
    seed : integer; with step and rank it determines a batch
    rank : of this process
    """

    def __init__(
        self,
        maker: ExampleMaker,
        lengths: Lengths,
        num_steps: int,
        num_tokens: int,
        padding_id: int,
        *,
        seed: int,
        rank: int = 0,
    ) -> None:
        self._maker = maker
        self._lengths = lengths
        self._num_steps = num_steps
        self._num_tokens = num_tokens
        self._padding_id = padding_id
        self._seed = seed
        self._rank = rank

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> HeadBatch:
        place = f"{self._seed}.{step}.{self._rank}"
        length = self._lengths.draw(step / self._num_steps, Draws("heads", "length", place))
        num = max(1, self._num_tokens // length)
        try:
            examples = [self._maker.make(f"{place}.{index}", length) for index in range(num)]
        except ValueError as error:
            # By now the other ranks are waiting for this one, so this is no matter of bad input: it ends all of them.
            raise RuntimeError(str(error)) from error
        return pad_examples(examples, self._padding_id)
