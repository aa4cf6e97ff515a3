"""An engine as a model of lm-evaluation-harness: ``lm_eval.simple_evaluate(model=HarnessModel(engine, tokenizer))``.

Needs the harness (``pip install -e '.[eval]'``).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apb_ds.config import BlockSettings
from apb_ds.engine.context import Context
from apb_ds.engine.engine import APBEngine, OnProgress
from apb_ds.tasks.lm_eval.prompts import NO_ROLLING, HarnessPrompts, HarnessRequest, Pair
from apb_ds.tasks.lm_eval.split import Split
from apb_ds.tasks.template import with_template


@dataclass(frozen=True)
class Response:
    """A request's answers, the same on every rank except for the times.

    Attributes
    ----------
    answers : texts, or (log-likelihood, whether greedy decoding gives it), one for each repeat or continuation
    exact : whether the prompt was so short that attention was exact
    new_tokens : tokens generated in all repeats
    """

    answers: list[Any]
    exact: bool
    new_tokens: int
    prefill_s: float
    seconds: float


class HarnessModel(HarnessPrompts):
    """Answers lm-evaluation-harness with an engine.

    Prompts are tokenised as the harness does for a transformers model, then cut into document and query by `split`; so
    an exact method gives the plain model's answers. Several ranks share each request, and all call the harness in the
    same way: each tells it that it is rank 0 of 1 (the harness then returns results on the first rank of each node).
    Prompts are never truncated: one that is too long is an error.

    Log-likelihoods are of continuations: their context is prefilled once. ``loglikelihood_rolling`` is refused.

    Parameters
    ----------
    engine : APBEngine
    tokenizer : the model's own
    split : str or callable
        Where the query begins in the user's last turn (without a chat template, in the prompt): ``paragraph`` (after
        its last blank line; at the last line if there is none or the paragraph is longer than all before it), ``line``
        (at its last line) or ``turn``. Or a function that takes the prompt and returns document and query, which
        together are the prompt.
    query_start : str, optional
        A text that the query begins with, if the prompt contains it; else `split` decides.
    template : mapping, optional
        Arguments of the chat template, such as ``{"enable_thinking": False}``. A system prompt is the harness's
        ``system_instruction``.
    query_position : int, tokens, optional
        As in the engine's settings. Default: the tokens that the chat template puts before the first turn.

    Raises
    ------
    RuntimeError
        If lm-evaluation-harness is not installed.
    ValueError
        For an unknown rule. When called, on every rank and before anything is sent, for what the engine cannot serve.
    """

    def __init__(
        self,
        engine: APBEngine,
        tokenizer: Any,
        *,
        split: str | Split = "paragraph",
        query_start: str | None = None,
        template: Mapping[str, Any] | None = None,
        query_position: int | None = None,
    ) -> None:
        super().__init__(with_template(tokenizer, None, template), split, query_start)
        self.engine = engine
        self._query_position = query_position

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers to the harness's requests, in order."""
        ours = [self.generation(*request.args) for request in requests]
        answers = []
        for request, response in zip(requests, self._respond_to(ours, disable_tqdm), strict=True):
            answers += response.answers
            self.cache_hook.add_partial("generate_until", request.args, response.answers[0])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Raise NotImplementedError."""
        raise NotImplementedError(f"loglikelihood_rolling is not supported: {NO_ROLLING}")

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        answers: list[Any] = []
        for response in self._respond_to(self.scorings(requests), disable_tqdm):
            answers += response.answers
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _respond_to(self, requests: list[HarnessRequest], disable_tqdm: bool) -> Iterator[Response]:
        from tqdm import tqdm

        self._check_same(requests)
        shown = self.engine.group.is_first and not disable_tqdm
        before = self.engine.apb_config
        try:
            for request in tqdm(requests, disable=not shown, desc="APB"):
                self._set_position(request)
                yield respond(self.engine, self.tokenizer, request)
        finally:
            if self.engine.apb_config is not before:
                self.engine.configure(before)

    def _set_position(self, request: HarnessRequest) -> None:
        config = self.engine.apb_config
        position = request.query_position if self._query_position is None else self._query_position
        settings = config.settings
        if isinstance(settings, BlockSettings) and settings.query_position != position:
            self.engine.configure(replace(config, query_position=position))

    def _check_same(self, requests: list[HarnessRequest]) -> None:
        """Raise ValueError on every rank if the harness has built different requests on one of them."""
        digest = hashlib.sha256()
        for request in requests:
            digest.update(repr(request.parts).encode())
        if len(set(self.engine.group.gather_objects(digest.hexdigest()))) > 1:
            raise ValueError(
                "the ranks have built different prompts, but they share each one: give every rank the same tasks, data "
                "and seeds. For tasks that draw at random without a seed, use launch/eval.py task=lm_eval, where one "
                "rank builds the prompts for all."
            )


def respond(engine: APBEngine, tokenizer: Any, request: HarnessRequest, progress: OnProgress | None = None) -> Response:
    """Answer a request. All ranks call this together.

    Raises
    ------
    ValueError
        For what the engine cannot serve, on every rank and before anything is sent.
    """
    began = time.perf_counter()
    answer_length = max(map(len, request.continuations), default=request.max_new_tokens)
    context: Context | None = None
    if request.num_document:
        positions = request.num_document + request.num_query + answer_length
        context = engine.prefill(
            request.document_ids, request.anchor_query_ids, max_positions=positions, progress=progress
        )
    answers: list[Any] = [_score(engine, context, request.query_ids, one) for one in request.continuations]
    new_tokens = 0
    if context is not None and not answers:
        for _ in range(request.repeats):
            tokens = _generate(engine, tokenizer, context, request)
            new_tokens += len(tokens)
            answers.append(_text(tokenizer, tokens, request.until))
    return Response(
        answers=answers,
        exact=context is None or context.plan.exact,
        new_tokens=new_tokens,
        prefill_s=0.0 if context is None else context.prefill_s,
        seconds=time.perf_counter() - began,
    )


def _generate(engine: APBEngine, tokenizer: Any, context: Context, request: HarnessRequest) -> list[int]:
    from lm_eval.models.utils_hf import stop_sequences_criteria

    prompt_length = request.num_document + request.num_query
    tokens = engine.generate(
        query_ids=request.query_ids,
        context=context,
        max_new_tokens=request.max_new_tokens,
        # The harness's own criterion: it sees only the answer, and not a stop text that began in the prompt.
        stopping_criteria=stop_sequences_criteria(tokenizer, list(request.until), prompt_length, 1),
        **request.generate,
    )
    return tokens[0].tolist()


def _text(tokenizer: Any, tokens: list[int], until: Sequence[str]) -> str:
    from lm_eval.models.utils import postprocess_generated_text

    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return postprocess_generated_text(text, stop=list(until), think_end_token=None)


def _score(
    engine: APBEngine, context: Context | None, query_ids: Tensor, continuation: tuple[int, ...]
) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation of the prompt, and whether greedy decoding gives it."""
    if not continuation:
        return 0.0, True
    wanted = torch.tensor(continuation, device=engine.device)
    query = torch.cat([query_ids.to(engine.device), wanted[None, :-1]], dim=1)
    if context is None:  # a prompt of one token needs no engine
        with torch.no_grad():
            logits = engine.group.broadcast(engine.module(query).logits[:, -len(continuation) :].float().contiguous())
    else:
        logits = engine.query_logits(query, context=context)[:, -len(continuation) :]
    log_probs = logits[0].log_softmax(dim=-1)
    likelihood = log_probs.gather(-1, wanted[:, None]).sum()
    return float(likelihood), bool((log_probs.argmax(dim=-1) == wanted).all())
