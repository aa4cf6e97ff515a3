"""The harness' instances as requests: tokenised as the harness does for a plain model, then cut in two.

So document and query together are token for token what lm-evaluation-harness gives to a transformers model, and an
exact method has the same answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apb_ds.tasks.base import Sample
from apb_ds.tasks.lm_eval.split import RenderedPrompt, Split, make_split, render
from apb_ds.tasks.prompts import ONE_TURN_SEPARATOR, Prompt, encode_after, header, num_equal

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
except ImportError as error:
    raise RuntimeError(
        f"lm-evaluation-harness is needed here, and {error.name or 'lm_eval'} is not installed; "
        "install it with: pip install -e '.[eval]'"
    ) from error

NO_ROLLING = (
    "tokens within a document have no logits here, only those of a query; for perplexities over long texts there is "
    "launch/eval.py task=fidelity."
)
MAX_NEW_TOKENS = 256  # the harness' own default
# A request as the harness passes it on: (context, continuation) as texts, and both as ids.
Pair = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class Request(Sample):
    """What one prompt is asked: to be continued, or how likely some continuations are.

    Attributes
    ----------
    continuations : ids to score; none where text is generated. A prompt of one token has no document then.
    until : texts that end the answer and are cut off it, the end token among them
    repeats : how many answers are generated
    """

    continuations: tuple[tuple[int, ...], ...] = ()
    until: tuple[str, ...] = ()
    repeats: int = 1


class HarnessPrompts(TemplateLM):
    """The part of a harness' model that needs a tokenizer alone.

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
        self._header_ids: list[int] | None = None

    # --- what the harness asks of a model's tokenizer ----------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise ValueError("the tokenizer has neither a begin nor an end token, to stand before an empty context.")
        return found

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids; special tokens are added as the tokenizer does, unless the text begins with one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.bos_token):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(str(string), verbose=False, **options)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; without an opened answer, the last turn is the answer's beginning and stays open."""
        from jinja2.exceptions import TemplateError

        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            text = self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        except TemplateError:  # the harness' own rule: some templates have no system role
            chat_history = [message for message in chat_history if message["role"] != "system"]
            text = self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        return render(text, chat_history)

    # --- requests ----------------------------------------------------------------------------------------------------

    def generation(self, prompt: str, arguments: dict[str, Any], repeats: int = 1) -> Request:
        """Return the request to continue a prompt.

        Parameters
        ----------
        arguments : the harness' ``generation_kwargs``

        Raises
        ------
        ValueError
            For an empty prompt.
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
        cut = self._cut(prompt, ids)
        return Request(
            document_ids=torch.tensor([cut.document_ids]),
            query_ids=torch.tensor([cut.query_ids]),
            embedded_ids=self._embedded(prompt),
            query_position=cut.query_position,
            max_new_tokens=max_new_tokens,
            generate=values,
            until=tuple(text for text in until if text),
            repeats=repeats,
        )

    def scorings(self, pairs: Sequence[Pair]) -> list[Request]:
        """Return the requests to score continuations; those in a row that have a context in common share one."""
        requests = []
        for (context, ids), group in itertools.groupby(pairs, key=lambda pair: (pair[0][0], pair[1])):
            cut = self._cut(context, ids)
            requests.append(
                Request(
                    document_ids=torch.tensor([cut.document_ids], dtype=torch.int64),
                    query_ids=torch.tensor([cut.query_ids]),
                    embedded_ids=self._embedded(context),
                    query_position=cut.query_position,
                    max_new_tokens=1,
                    continuations=tuple(tuple(pair[2]) for pair in group),
                )
            )
        return requests

    def _cut(self, prompt: str, ids: list[int]) -> Prompt:
        """Cut the ids of a prompt where its text is cut; the token that the cut goes through is the query's."""
        document, _ = self._split(prompt)
        same = num_equal(self.tok_encode(document), ids) if document else 0
        place = min(max(same, 1), len(ids) - 1)
        return Prompt(ids[:place], ids[place:], min(self._position(prompt, ids), place))

    def _embedded(self, prompt: str) -> torch.Tensor | None:
        """Return the ids that the anchor embeds: what the user asks, less what closes the turn; None for the query."""
        start = len(self._split(prompt)[0])
        question = prompt[start : prompt.turn[1]].strip() if isinstance(prompt, RenderedPrompt) else ""
        if not question:
            return None
        return torch.tensor([encode_after(self.tokenizer, header(self.tokenizer), question + ONE_TURN_SEPARATOR)])

    def _position(self, prompt: str, ids: list[int]) -> int:
        """Return how many tokens precede the first turn's text, or whether there is a begin token."""
        if not isinstance(prompt, RenderedPrompt):
            return int(ids[0] == self.tokenizer.bos_token_id)
        if self._header_ids is None:
            self._header_ids = self.tok_encode(header(self.tokenizer))
        return num_equal(self._header_ids, ids)
