"""The harness's instances as requests: tokenised as the harness does for a plain model, then cut in two.

So document and query together are token for token what lm-evaluation-harness passes to a transformers model, and an
exact method gives the same answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apb_ds.tasks.base import Sample
from apb_ds.tasks.lm_eval.split import RenderedPrompt, Split, make_split, mark_turn
from apb_ds.tasks.prompts import ONE_TURN_SEPARATOR, encode_after, header, num_equal
from apb_ds.tasks.template import TemplateRefusal, render

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
except ImportError as error:
    raise RuntimeError(
        f"this needs lm-evaluation-harness, and {error.name or 'lm_eval'} is not installed; install it with: "
        "pip install -e '.[eval]'"
    ) from error

NO_ROLLING = (
    "only a query's tokens have logits here, not those within a document; for perplexities over long texts use "
    "task=fidelity."
)
MAX_NEW_TOKENS = 256  # the harness's own default
# A request as the harness passes it on: (context, continuation) as texts, and both as ids.
Pair = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class HarnessRequest(Sample):
    """One prompt, to be continued, or with continuations to be scored.

    Attributes
    ----------
    continuations : ids to score; empty if text is generated. Only here may a prompt be one token, without a document.
    until : texts that end the answer and are removed from it, the end token among them
    repeats : how many answers are generated
    """

    continuations: tuple[tuple[int, ...], ...] = ()
    until: tuple[str, ...] = ()
    repeats: int = 1

    @property
    def parts(self) -> list[Any]:
        """Everything that decides the answer, as JSON values."""
        ids = [part.flatten().tolist() for part in (self.document_ids, self.query_ids, self.anchor_query_ids)]
        how = [self.max_new_tokens, sorted(self.generate.items()), list(self.until), self.repeats]
        return [*ids, [list(one) for one in self.continuations], *how]


class HarnessPrompts(TemplateLM):
    """The part of a harness model that needs only a tokenizer.

    Parameters
    ----------
    tokenizer : the model's own
    split : a rule's name or a function, see `apb_ds.tasks.lm_eval.split`
    query_start : a text that the query begins with
    """

    def __init__(self, tokenizer: Any, split: str | Split = "paragraph", query_start: str | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._split = make_split(split, query_start)

    # --- what the harness needs of a model's tokenizer ---------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise ValueError("the tokenizer has neither a begin nor an end token to put before an empty context.")
        return found

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids; the tokenizer adds its special tokens unless the text begins with one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.bos_token):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(str(string), verbose=False, **options)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; without a generation prompt, the last turn is the answer's beginning and stays open."""
        options = {"generation": add_generation_prompt, "continue_last": not add_generation_prompt}
        try:
            text = render(self.tokenizer, chat_history, **options)
        except TemplateRefusal:  # as the harness does: some templates have no system role
            chat_history = [message for message in chat_history if message["role"] != "system"]
            text = render(self.tokenizer, chat_history, **options)
        system = next((message["content"] for message in chat_history if message["role"] == "system"), None)
        return mark_turn(text, chat_history, header(self.tokenizer, system))

    # --- requests ----------------------------------------------------------------------------------------------------

    def generation(self, prompt: str, arguments: dict[str, Any], repeats: int = 1) -> HarnessRequest:
        """Return the request to continue a prompt; ValueError if the prompt is empty.

        Parameters
        ----------
        arguments : the harness's ``generation_kwargs``
        """
        values: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(values.pop("until", None), eos=end)
        max_new_tokens = values.pop("max_gen_toks")
        if not values["do_sample"]:
            values.pop("temperature", None)
        ids = self.tok_encode(prompt)
        if not ids:
            raise ValueError("the prompt is empty; there is nothing to continue.")
        if len(ids) == 1:  # the engine needs a document and a query
            ids = [self.prefix_token_id, *ids]
        until = tuple(text for text in until if text)
        return self._cut(prompt, ids, max_new_tokens=max_new_tokens, generate=values, until=until, repeats=repeats)

    def scorings(self, pairs: Sequence[Pair]) -> list[HarnessRequest]:
        """Return the requests to score continuations; consecutive ones with the same context share one."""
        return [
            self._cut(context, ids, max_new_tokens=1, continuations=tuple(tuple(pair[2]) for pair in group))
            for (context, ids), group in itertools.groupby(pairs, key=lambda pair: (pair[0][0], pair[1]))
        ]

    def _cut(self, prompt: str, ids: list[int], **fields: Any) -> HarnessRequest:
        """Cut the ids of a prompt where its text is cut; a token that spans the cut goes to the query."""
        document, _ = self._split(prompt)
        same = num_equal(self.tok_encode(document), ids) if document else 0
        cut = min(max(same, 1), len(ids) - 1)
        return HarnessRequest(
            document_ids=torch.tensor([ids[:cut]], dtype=torch.int64),
            query_ids=torch.tensor([ids[cut:]]),
            embedded_ids=self._embedded(prompt, len(document)),
            query_position=min(self._position(prompt, ids), cut),
            **fields,
        )

    def _embedded(self, prompt: str, start: int) -> torch.Tensor | None:
        """Return the ids that the anchor embeds: the user's question without the turn's end; None for the query."""
        if not isinstance(prompt, RenderedPrompt):
            return None
        question = prompt[start : prompt.turn[1]].strip()
        if not question:
            return None
        return torch.tensor([encode_after(self.tokenizer, prompt.header, question + ONE_TURN_SEPARATOR)])

    def _position(self, prompt: str, ids: list[int]) -> int:
        """Return how many tokens precede the first turn's text; in a plain text, the begin-of-sequence token."""
        if not isinstance(prompt, RenderedPrompt):
            return int(ids[0] == self.tokenizer.bos_token_id)
        return num_equal(self.tok_encode(prompt.header), ids)
