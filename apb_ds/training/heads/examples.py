"""What heads are trained on: conversations over long documents, generated, real or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apb_ds.tasks.prompts import encode, encode_document
from apb_ds.tasks.synthetic.documents import longest
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.generate import generate
from apb_ds.tasks.synthetic.recipe import KINDS, NEEDLES
from apb_ds.tasks.template import has_template, render, user
from apb_ds.training.batches import Example
from apb_ds.training.conversations import MAX_DRAWS, TURN_TOKENS, make_conversation
from apb_ds.training.heads.config import ANSWER, HeadsConfig
from apb_ds.training.heads.layouts import QuoteLayout, TextNeedles
from apb_ds.training.heads.sharegpt import ShareGPT
from apb_ds.training.heads.texts import TextFiller
from apb_ds.training.mixture import Mixture

# Room for the question and the answer of `quote`, whose passages are long.
QUOTE_TOKENS = 700
CONTINUED_TOKENS = 128
MAX_ANSWER_TOKENS = 1024


class ExampleMaker:
    """Makes conversations whose marked tokens are the observers.

    Parameters
    ----------
    config : HeadsConfig
    mixture : recipes of generated documents
    files : real texts
    data : the user's conversations, or None
    tokenizer : transformers tokenizer
    """

    name = "heads"

    def __init__(
        self, config: HeadsConfig, mixture: Mixture, files: Sequence[Path], data: ShareGPT | None, tokenizer: Any
    ) -> None:
        self._config = config
        self._mixture = mixture
        self._files = files
        self._data = data
        self.tokenizer = tokenizer

    def make(self, seed: str, length: int) -> Example:
        """Return the conversation that a seed determines, see `Source.make`."""
        draws = Draws(self.name, seed)
        example = self._whole(draws, seed, length)
        return replace(example, marked=self._observers(example, draws))

    def _observers(self, example: Example, draws: Draws) -> list[int]:
        """Return the observers' positions, ascending, in an example whose marked tokens are its answers."""
        among = example.marked if self._config.observers == ANSWER else range(1, len(example.ids))
        number = self._config.num_observers
        if len(among) <= number:
            return list(among)
        # The last token sees the whole document, so that all of it is observed.
        drawn = draws.sample(len(among) - 1, number - 1)
        return sorted(among[place] for place in (*drawn, len(among) - 1))

    def _whole(self, draws: Draws, seed: str, length: int) -> Example:
        """Return a conversation with the tokens of its answers marked."""
        if self._data is not None and draws.fraction() < self._config.data_share:
            return self._given(self._data, draws, length)
        for attempt in range(MAX_DRAWS):
            try:
                example = self._generated(draws, f"{seed}.{attempt}", length)
            except ValueError:  # too short for this recipe; another one may fit
                continue
            if example is not None:
                return example
        raise ValueError(f"no conversation fits into {length} tokens; raise train.min_length.")

    def _generated(self, draws: Draws, seed: str, length: int) -> Example | None:
        """Return a conversation of a kind that is drawn; None if it does not fit."""
        config, files = self._config, self._files
        drawn = draws.fraction()
        if drawn < config.continue_share:
            return self._continued(draws, length)
        if drawn < config.continue_share + config.quote_share:
            quote = QuoteLayout(TextFiller(files, draws), draws.fraction())
            return make_conversation(
                self.tokenizer, longest(quote, length - QUOTE_TOKENS, self._length), "quote", length
            )
        recipe = self._mixture.draw(draws)
        room = length - TURN_TOKENS * recipe.num_questions
        if room < TURN_TOKENS:
            return None
        if KINDS[recipe.kind].fillers and recipe.filler_used != NEEDLES and draws.fraction() < config.text_share:
            needles = TextNeedles(recipe, (recipe.split, recipe.kind, seed, room), TextFiller(files, draws))
            document = longest(needles, room, self._length)
        else:
            document = generate(recipe, seed, room, self._length)
        return make_conversation(self.tokenizer, document, recipe.kind, length)

    def _length(self, text: str) -> int:
        return len(encode_document(self.tokenizer, text).ids)

    def _continued(self, draws: Draws, length: int) -> Example:
        """Return real text; its last tokens are the answer."""
        filler, num = TextFiller(self._files, draws), 16
        ids: list[int] = []
        while len(ids) < length:
            ids = encode(self.tokenizer, "".join(filler.sentences(num)))
            num *= 2
        num_answer = min(CONTINUED_TOKENS, length // 4)
        return Example(ids[:length], length - num_answer, list(range(length - num_answer, length)), "continue")

    def _given(self, data: ShareGPT, draws: Draws, length: int) -> Example:
        """Return one of the user's conversations; a prompt that is too long loses its middle."""
        prompt, answer = data.pair(draws.choose(data.indices))
        ids = encode_prompt(self.tokenizer, prompt)
        answer_ids = [*encode(self.tokenizer, answer), self.tokenizer.eos_token_id]
        answer_ids = answer_ids[: min(MAX_ANSWER_TOKENS, length // 2)]
        room = length - len(answer_ids)
        if len(ids) > room:
            ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
        return Example(ids + answer_ids, len(ids), list(range(len(ids), len(ids) + len(answer_ids))), "given")


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a user's turn and the start of the answer; of text and newline without a chat template."""
    if not has_template(tokenizer):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + encode(tokenizer, f"{prompt}\n")
    return encode(tokenizer, render(tokenizer, [user(prompt)], generation=True))
