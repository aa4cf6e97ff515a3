"""Questions that decode together: they wait until there are enough of them, then share every forward."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from apb_ds.engine.batch import SHORT_DOCUMENT_TOKENS, Batch
from apb_ds.engine.context import Context
from apb_ds.engine.decoding import RequestStats
from apb_ds.ops.memory import available_bytes, is_out_of_memory
from apb_ds.parallel.launcher import ranks_on_node
from apb_ds.plan import Plan

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine, OnProgress
    from apb_ds.engine.sequences import Handle

# Of the memory that is free at first: what the documents of waiting questions may take. Prefills need the rest.
DOCUMENTS_SHARE = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Question:
    """A query about a document; its answer is generated, or given and to be scored.

    Attributes
    ----------
    query_ids : (1, q), int64
    context : the document, prefilled; None for `document_ids`
    document_ids : (1, n), int64, of a document for which `AnswerQueue.shares_forward`
    max_new_tokens, seed, arguments : of `APBEngine.generate`
    continuation : ids to score; None to generate
    tag : what the asker knows it by
    """

    query_ids: Tensor
    context: Context | None = None
    document_ids: Tensor | None = None
    max_new_tokens: int = 1
    seed: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    continuation: tuple[int, ...] | None = None
    tag: Any = None


@dataclass
class Ended:
    """A question that was answered, or failed.

    Attributes
    ----------
    tokens : the answer's ids, the same on every rank
    score : of a continuation: its log-likelihood, and whether greedy decoding gives it
    error : why it failed, or None; the exception itself on the rank that raised it
    query_s : seconds until the first token, or of scoring
    decode_s : seconds of all further tokens, other sequences' included
    share_s : `decode_s` with each step's seconds divided by its sequences
    """

    question: Question
    tokens: list[int] = field(default_factory=list)
    score: tuple[float, bool] = (0.0, True)
    error: BaseException | None = None
    query_s: float = 0.0
    decode_s: float = 0.0
    share_s: float = 0.0


class AnswerQueue:
    """Questions about several documents of one engine, answered so many at a time; a context manager.

    All ranks call its methods in the same order with the same arguments. One question at a time takes the engine's own
    path for one, which is faster. Where memory runs out on one rank alone, fewer go on together::

        while not queue.has_room(plan):
            take(queue.step())
        context = queue.prefill(document_ids, query_ids)
        queue.ask(Question(query_ids, context))
        while queue.is_full:
            take(queue.step())

    Parameters
    ----------
    sequences : that decode at a time
    setting : what that number is called where the user sets it

    Attributes
    ----------
    stats : where the time of queries and steps went on this rank
    """

    def __init__(self, engine: APBEngine, sequences: int, setting: str = "sequences") -> None:
        self.stats = RequestStats()
        self._engine = engine
        self._group = engine.group
        self._sequences = sequences
        self._setting = setting
        self._waiting: deque[Question] = deque()
        self._running: dict[int, tuple[Handle, Question]] = {}  # by id of the handle, in the order of asking
        self._shares: dict[int, float] = {}
        self._batch: Batch | None = None
        sharing = ranks_on_node() if engine.device.type == "cpu" else 1
        mine = torch.tensor([available_bytes(engine.device) // sharing], device=engine.device)
        self._document_bytes = DOCUMENTS_SHARE * int(self._group.all_gather(mine).min())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_batch()

    def __len__(self) -> int:
        """Questions that have not ended."""
        return len(self._waiting) + len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether as many questions are there as go on together; `step` then."""
        return len(self) >= self._sequences

    def has_room(self, plan: Plan) -> bool:
        """Whether a document may be prefilled next to those that are asked about; if not, `step`."""
        questions = [*self._waiting, *(question for _, question in self._running.values())]
        contexts = {id(question.context): question.context for question in questions if question.context is not None}
        plans = [plan, *(context.plan for context in contexts.values())]
        return not contexts or sum(map(self._bytes_of, plans)) <= self._document_bytes

    def shares_forward(self, plan: Plan) -> bool:
        """Whether a document is so short that its query's forward runs it, together with others'."""
        return self._sequences > 1 and plan.exact and plan.num_tokens <= SHORT_DOCUMENT_TOKENS

    def prefill(
        self,
        document_ids: Tensor,
        query_ids: Tensor | None,
        *,
        max_positions: int,
        progress: OnProgress | None = None,
    ) -> Context | None:
        """Prefill a document as `APBEngine.prefill` does.

        Returns
        -------
        None if memory ran out and other questions are there: `step` until they have ended, then try again.
        """
        try:
            return self._engine.prefill(document_ids, query_ids, max_positions=max_positions, progress=progress)
        except torch.OutOfMemoryError as error:
            if not len(self):
                raise
            self._check_memory(error)
            return None

    def ask(self, question: Question) -> None:
        """Add a question."""
        self._waiting.append(question)

    def step(self) -> list[Ended]:
        """Score what is to be scored, else give every sequence its next token; return the questions that ended.

        Raises
        ------
        Exception
            On one of several ranks, for anything but bad input: the others are in a collective.
        """
        scored = [question for question in self._waiting if question.continuation is not None][: self._sequences]
        if scored:
            self._waiting = deque(question for question in self._waiting if question not in scored)
            return self._score(scored)
        if not len(self):
            return []
        if not self._running and (self._sequences == 1 or len(self._waiting) == 1):
            return [self._answer_alone(self._waiting.popleft())]
        return self._step_together()

    # --- one at a time -----------------------------------------------------------------------------------------------

    def _answer_alone(self, question: Question) -> Ended:
        engine = self._engine
        try:
            tokens = engine.generate(**_arguments_of(question))
        except Exception as error:
            self._check_shared(error)
            return Ended(question, error=error)
        stats = engine.stats
        self.stats.query_s += stats.query_s + stats.prefill_s
        self.stats.decode_s += stats.decode_s
        self.stats.new_tokens += stats.new_tokens
        query_s = stats.prefill_s + stats.query_s
        return Ended(question, tokens[0].tolist(), query_s=query_s, decode_s=stats.decode_s, share_s=stats.decode_s)

    # --- together ----------------------------------------------------------------------------------------------------

    def _step_together(self) -> list[Ended]:
        refused = self._submit()
        batch = self._batch
        assert batch is not None
        before = {key: handle.decode_s for key, (handle, _) in self._running.items()}
        stats = RequestStats(query_s=batch.stats.query_s, decode_s=batch.stats.decode_s)
        num_before = batch.stats.new_tokens
        try:
            handles = batch.step()
        except torch.OutOfMemoryError as error:
            self._check_memory(error)
            self._try_fewer([])
            return refused
        self.stats.query_s += batch.stats.query_s - stats.query_s
        self.stats.decode_s += batch.stats.decode_s - stats.decode_s
        self.stats.new_tokens += batch.stats.new_tokens - num_before
        stepped = [key for key, seconds in before.items() if self._running[key][0].decode_s > seconds]
        for key in stepped:
            share = (self._running[key][0].decode_s - before[key]) / len(stepped)
            self._shares[key] = self._shares.get(key, 0.0) + share
        return refused + self._ended(handles)

    def _submit(self) -> list[Ended]:
        """Hand the waiting questions to the batch; return those that it refuses."""
        if not self._running:
            self._close_batch()
            self._batch = self._engine.batch(self._sequences)
        refused = []
        assert self._batch is not None
        while self._waiting:
            question = self._waiting.popleft()
            try:
                handle = self._batch.submit(**_arguments_of(question))
            except ValueError as error:
                refused.append(Ended(question, error=error))
            else:
                self._running[id(handle)] = handle, question
        return refused

    def _ended(self, handles: list[Handle]) -> list[Ended]:
        ended, again = [], []
        for handle in handles:
            _, question = self._running.pop(id(handle))
            share_s = self._shares.pop(id(handle), 0.0)
            error = handle.error
            if error is not None and is_out_of_memory(error) and self._group.world_size == 1 and self._sequences > 1:
                again.append(question)
                continue
            ended.append(Ended(question, handle.tokens, (0.0, True), error, handle.query_s, handle.decode_s, share_s))
        if again:
            self._try_fewer(again)
        return ended

    def _try_fewer(self, again: list[Question]) -> None:
        """Begin all questions again, half as many at a time."""
        self._waiting.extendleft(reversed([*again, *(question for _, question in self._running.values())]))
        self._close_batch()
        self._sequences = max(1, self._sequences // 2)
        logger.warning("memory ran out; going on with %s=%d.", self._setting, self._sequences)

    def _close_batch(self) -> None:
        self._running, self._shares = {}, {}
        if self._batch is not None:
            self._batch.close()
        self._batch = None

    # --- scoring -----------------------------------------------------------------------------------------------------

    def _score(self, questions: Sequence[Question]) -> list[Ended]:
        """Score continuations in one pack; if one is bad or memory runs out, in smaller ones."""
        began = time.perf_counter()
        try:
            scores = self._scores(questions)
        except Exception as error:
            self._check_shared(error)
            if len(questions) == 1:
                return [Ended(questions[0], error=error)]
            if is_out_of_memory(error):
                self._sequences = max(1, self._sequences // 2)
            middle = len(questions) // 2
            return self._score(questions[:middle]) + self._score(questions[middle:])
        seconds = time.perf_counter() - began
        self.stats.query_s += seconds
        share = seconds / len(questions)
        return [Ended(question, score=score, query_s=share) for question, score in zip(questions, scores, strict=True)]

    def _scores(self, questions: Sequence[Question]) -> list[tuple[float, bool]]:
        engine = self._engine
        queries = [_with_continuation(question) for question in questions]
        contexts: list[Any] = [question.context for question in questions]
        if len(questions) == 1:
            logits = [engine.query_logits(queries[0], context=contexts[0])]
        else:
            logits = engine.query_logits(queries, context=contexts)
        return [
            score_of(found[0], question.continuation or ()) for found, question in zip(logits, questions, strict=True)
        ]

    # --- memory, and failures ----------------------------------------------------------------------------------------

    def _bytes_of(self, plan: Plan) -> int:
        """Return the bytes of a document on the rank that stores most of it."""
        return self._engine.pool.document_bytes(max(plan.shard_lengths))

    def _check_shared(self, error: Exception) -> None:
        """Raise an error that other ranks may not have."""
        if self._group.world_size > 1 and not isinstance(error, ValueError):
            raise error

    def _check_memory(self, error: torch.OutOfMemoryError) -> None:
        """Raise it on one of several ranks, which cannot try again alone; say what to set."""
        if self._group.world_size > 1:
            fewer = max(1, self._sequences // 2)
            raise torch.OutOfMemoryError(f"{error} Or set {self._setting}={fewer}.") from error


def score_of(logits: Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
    """Return a continuation's log-likelihood, and whether greedy decoding gives it.

    Parameters
    ----------
    logits : (tokens, vocab), float32; the last ones are those that the continuation follows from
    """
    wanted = torch.tensor(continuation, device=logits.device)
    log_probs = logits[-len(continuation) :].log_softmax(dim=-1)
    likelihood = log_probs.gather(-1, wanted[:, None]).sum()
    return float(likelihood), bool((log_probs.argmax(dim=-1) == wanted).all())


def _with_continuation(question: Question) -> Tensor:
    """Return query and continuation without its last token, (1, tokens)."""
    ids = torch.tensor([(question.continuation or ())[:-1]], dtype=torch.int64, device=question.query_ids.device)
    return torch.cat([question.query_ids, ids], dim=1)


def _arguments_of(question: Question) -> dict[str, Any]:
    """Return the arguments of `APBEngine.generate` and `Batch.submit`."""
    source: dict[str, Any] = {"context": question.context}
    if question.context is None:
        source = {"document_ids": question.document_ids}
    return {
        "query_ids": question.query_ids,
        **source,
        "max_new_tokens": question.max_new_tokens,
        "seed": question.seed,
        **question.arguments,
    }
