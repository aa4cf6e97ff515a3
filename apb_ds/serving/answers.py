"""One answer on the engine's side: what chooses its tokens, and what turns them into text for the client."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from apb_ds.serving.detokenizing import Detokenizer, find_special_ids
from apb_ds.serving.requests import Delta, Listener, Options, TokenLogprobs

# Smaller temperatures give the likeliest token: logits that are divided by less may overflow.
MIN_TEMPERATURE = 1e-5
# Settings of the model's generation_config.json that would change how a request asks to sample.
OTHER_WARPERS = {"top_k": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
COSTLY_WARPERS = {"min_p": 0.0}  # cost time even where they change nothing
CONTEXT_IDS = 8  # of the prompt, before the first token of an answer that continues it


class Answer(StoppingCriteria):
    """Takes the tokens of an answer, and sends their text as `Delta`s. The engine's thread calls it.

    It is transformers' streamer, and a stopping criterion for stop texts, which are looked for in the answer's text.

    Parameters
    ----------
    tokenizer : the model's
    options : as the client asked
    listener : gets a Delta for each token
    end_tokens : that end an answer, further to the tokenizer's own end token
    """

    def __init__(
        self, tokenizer: Any, options: Options, listener: Listener, *, end_tokens: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._listener = listener
        self._special_ids = find_special_ids(tokenizer)
        self._end_tokens = frozenset(end_tokens) | {tokenizer.eos_token_id}
        # Special tokens are not in the answer's text. A text that is not a token is not the unknown one.
        self._stop_ids = {
            token for token in self._special_ids if tokenizer.convert_ids_to_tokens(token) in options.stop
        }
        self._recorder = None if options.top_logprobs is None else LogprobRecorder(options.top_logprobs)
        self._detokenizer: Detokenizer | None = None
        self._held = ""  # may be the beginning of a stop text
        self.is_stopped = False

    def arguments(self, of_model: Any = None) -> dict[str, Any]:
        """Return the arguments of `generate`. Where a request is plain and greedy, so is its `Chooser`.

        Parameters
        ----------
        of_model : the model's GenerationConfig
        """
        options = self._options
        arguments: dict[str, Any] = {"streamer": self, "do_sample": options.temperature >= MIN_TEMPERATURE}
        if arguments["do_sample"]:
            arguments |= {"temperature": float(options.temperature), "top_p": float(options.top_p), **OTHER_WARPERS}
            arguments |= {name: off for name, off in COSTLY_WARPERS.items() if getattr(of_model, name, None)}
        processors: list[LogitsProcessor] = []
        if self._recorder is not None:
            processors.append(self._recorder)
        if options.logit_bias:
            processors.append(LogitBias(options.logit_bias))
        if options.frequency_penalty or options.presence_penalty:
            processors.append(Penalties(options.frequency_penalty, options.presence_penalty))
        if processors:
            arguments["logits_processor"] = LogitsProcessorList(processors)
        if options.stop:
            arguments["stopping_criteria"] = StoppingCriteriaList([self])
        if options.ignore_eos:
            # None would be the model's own; transformers takes the first end token for a padding token that is not set.
            arguments |= {"eos_token_id": [], "pad_token_id": 0}
        return arguments

    def reason(self, tokens: Sequence[int], num_new: int) -> str:
        """Return why the answer ended: ``stop``, or ``length``.

        Parameters
        ----------
        tokens : of the answer
        num_new : tokens that it may have at most
        """
        if self.is_stopped or len(tokens) < num_new:
            return "stop"
        return "stop" if not self._options.ignore_eos and tokens[-1] in self._end_tokens else "length"

    # --- transformers' streamer --------------------------------------------------------------------------------------

    def put(self, value: Tensor) -> None:
        """Take the prompt, (1, tokens), then a token, (1,), at a time; int64, on the CPU."""
        if self._detokenizer is None:
            before = value.view(-1)[-CONTEXT_IDS:].tolist() if self._options.continues else []
            self._detokenizer = Detokenizer(
                self._tokenizer, [token for token in before if token not in self._special_ids]
            )
            return
        token = int(value)
        text = ""
        if token in self._stop_ids:
            text = self._rest()
            self.is_stopped = True
        elif token not in self._special_ids:
            text = self._until_stop(self._detokenizer.add(token))
        logprobs = () if self._recorder is None else (self._recorder.of(token),)
        self._listener(Delta(text, (token,), logprobs))

    def end(self) -> None:
        """Send what was held back."""
        if self.is_stopped or self._detokenizer is None:
            return
        text = self._rest()
        if text:
            self._listener(Delta(text, ()))

    def _rest(self) -> str:
        """Return the text that was held back, as no more comes."""
        assert self._detokenizer is not None
        text = self._until_stop(self._detokenizer.end())
        text, self._held = text + self._held, ""
        return text

    def _until_stop(self, new: str) -> str:
        """Return the text that can be sent, once `new` has come: what comes before a stop text, or may become one."""
        stops = self._options.stop
        text = self._held + new
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        if places:
            self.is_stopped = True
            self._held = ""
            return text[: min(places)]
        num_held = max((_count_begun(text, stop) for stop in stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    # --- transformers' stopping criterion ----------------------------------------------------------------------------

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether the last token completed a stop text, (batch,), bool."""
        return torch.full((input_ids.shape[0],), self.is_stopped, device=input_ids.device)


def _count_begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


class LogprobRecorder(LogitsProcessor):
    """Notes the model's log-probabilities, before a request's bias, penalties and temperature change them.

    Parameters
    ----------
    num_top : likeliest tokens to note
    """

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._logprobs: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take and return scores, (1, vocab), float32."""
        self._logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def of(self, token: int) -> TokenLogprobs:
        """Return the log-probabilities of the token that was chosen from the latest scores."""
        assert self._logprobs is not None
        values, ids = self._logprobs.topk(min(self._num_top, len(self._logprobs)))
        return TokenLogprobs(float(self._logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


class LogitBias(LogitsProcessor):
    """Adds to the logits of some tokens."""

    def __init__(self, bias: Any) -> None:
        self._bias = dict(bias)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, (1, vocab), float32, with the bias."""
        known = {token: value for token, value in self._bias.items() if token < scores.shape[-1]}
        ids = torch.tensor(list(known), dtype=torch.int64, device=scores.device)
        values = torch.tensor(list(known.values()), dtype=scores.dtype, device=scores.device)
        return scores.index_add(-1, ids, values.unsqueeze(0))


class Penalties(LogitsProcessor):
    """Makes tokens of the answer less likely to come again, as OpenAI defines it; the prompt's do not count.

    Parameters
    ----------
    frequency : taken off a token's logit each time it came
    presence : taken off once
    """

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency = frequency
        self._presence = presence
        self._counts: Tensor | None = None  # (vocab,), of the answer's tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, (1, vocab), float32, with the penalties; called once a token, first with the prompt."""
        if self._counts is None:
            self._counts = torch.zeros_like(scores[0])
        else:
            self._counts[input_ids[0, -1]] += 1
        return scores - self._frequency * self._counts - self._presence * (self._counts > 0)
