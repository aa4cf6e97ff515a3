"""The harness's requests in a queue of questions: prefilled, asked, and put together from the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from apb_ds.engine.context import Context
from apb_ds.engine.engine import APBEngine, OnProgress
from apb_ds.plan import Plan, plan_request
from apb_ds.tasks.lm_eval.prompts import HarnessRequest
from apb_ds.tasks.queue import AnswerQueue, Ended, Question, score_of


class Asked:
    """A request that was asked, the same on every rank except for the times.

    Parameters
    ----------
    owner : what the asker knows it by

    Attributes
    ----------
    answers : texts, or (log-likelihood, whether greedy decoding gives it), one for each repeat or continuation; None
        where there is none yet
    exact : whether the prompt was so short that attention was exact
    new_tokens : tokens generated in all repeats
    prefill_s : of a short document that shared its query's forward: of that
    seconds : of prefill and answers, a step's seconds divided by the sequences that took part in it
    """

    def __init__(self, request: HarnessRequest, owner: Any = None) -> None:
        self.request = request
        self.owner = owner
        self.answers: list[Any] = [None] * (len(request.continuations) or request.repeats)
        self.exact = True
        self.new_tokens = 0
        self.prefill_s = self.seconds = 0.0
        self.tokenizer: Any = None

    @property
    def is_done(self) -> bool:
        return all(answer is not None for answer in self.answers)

    def take(self, ended: Ended) -> None:
        """Take an answer. Raises what made it fail."""
        if ended.error is not None:
            raise ended.error
        _, place = ended.question.tag
        if ended.question.continuation is not None:
            self.answers[place] = ended.score
        else:
            self.answers[place] = _text(self.tokenizer, ended.tokens, self.request.until)
            self.new_tokens += len(ended.tokens)
        if ended.question.document_ids is not None:
            self.prefill_s += ended.query_s
        self.seconds += ended.query_s + ended.share_s


def plan_of(engine: APBEngine, request: HarnessRequest, *, with_query: bool = False) -> Plan:
    """Return how the settings in force split a request's document, with what the anchor embeds, or with the query."""
    num_query = request.num_query if with_query else request.anchor_query_ids.shape[1]
    return plan_request(engine.apb_config, request.num_document, num_query, engine.attention.group.world_size)


def needs_prefill(engine: APBEngine, queue: AnswerQueue, request: HarnessRequest) -> bool:
    """Whether a request has a document that must be prefilled, and not one that shares its query's forward.

    Raises
    ------
    ValueError
        If the lengths do not fit the settings.
    """
    if not request.num_document:
        return False
    if request.continuations or request.repeats > 1 or not queue.shares_forward(plan_of(engine, request)):
        return True
    return not plan_of(engine, request, with_query=True).exact


def prefill(queue: AnswerQueue, request: HarnessRequest, progress: OnProgress | None = None) -> Context | None:
    """Prefill a request's document, see `AnswerQueue.prefill`."""
    answer_length = max(map(len, request.continuations), default=request.max_new_tokens)
    positions = request.num_document + request.num_query + answer_length
    return queue.prefill(request.document_ids, request.anchor_query_ids, max_positions=positions, progress=progress)


def ask(
    engine: APBEngine,
    queue: AnswerQueue,
    tokenizer: Any,
    asked: Asked,
    context: Context | None,
    seeds: Sequence[int | None],
) -> None:
    """Put a request's questions into the queue; their tags are (asked, place). All ranks call this together.

    Parameters
    ----------
    context : the document, if the request `needs_prefill`
    seeds : for each repeat
    """
    request = asked.request
    asked.tokenizer = tokenizer
    if context is not None:
        asked.exact = context.plan.exact
        asked.prefill_s = asked.seconds = context.prefill_s
    for place, continuation in enumerate(request.continuations):
        if not continuation:
            asked.answers[place] = (0.0, True)
        elif context is None:
            asked.answers[place] = _score_without_document(engine, request, continuation)
        else:
            queue.ask(Question(request.query_ids, context, continuation=continuation, tag=(asked, place)))
    if request.continuations:
        return
    for place, seed in enumerate(seeds):
        queue.ask(
            Question(
                request.query_ids,
                context,
                document_ids=None if context is not None else request.document_ids,
                max_new_tokens=request.max_new_tokens,
                seed=seed,
                arguments=_arguments(tokenizer, request),
                tag=(asked, place),
            )
        )


def _arguments(tokenizer: Any, request: HarnessRequest) -> dict[str, Any]:
    from lm_eval.models.utils_hf import stop_sequences_criteria

    prompt_length = request.num_document + request.num_query
    # The harness's own criterion: it sees only the answer, and not a stop text that began in the prompt.
    criteria = stop_sequences_criteria(tokenizer, list(request.until), prompt_length, 1)
    return {**request.generate, "stopping_criteria": criteria}


def _text(tokenizer: Any, tokens: list[int], until: Sequence[str]) -> str:
    from lm_eval.models.utils import postprocess_generated_text

    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return postprocess_generated_text(text, stop=list(until), think_end_token=None)


def _score_without_document(
    engine: APBEngine, request: HarnessRequest, continuation: tuple[int, ...]
) -> tuple[float, bool]:
    """Score a continuation of a prompt of one token, which needs no engine."""
    ids = torch.tensor([continuation[:-1]], dtype=torch.int64, device=engine.device)
    query = torch.cat([request.query_ids.to(engine.device), ids], dim=1)
    with torch.no_grad():
        logits = engine.module(query).logits[:, -len(continuation) :].float().contiguous()
    return score_of(engine.group.broadcast(logits)[0], continuation)
