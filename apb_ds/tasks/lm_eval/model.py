"""An engine as a model of lm-evaluation-harness: ``lm_eval.simple_evaluate(model=HarnessModel(engine, tokenizer))``.

Needs the harness (``pip install -e '.[eval]'``).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from apb_ds.config import BlockSettings, check_integer
from apb_ds.engine.engine import APBEngine
from apb_ds.tasks.lm_eval.asking import Asked, ask, needs_prefill, plan_of, prefill
from apb_ds.tasks.lm_eval.prompts import NO_ROLLING, HarnessPrompts, HarnessRequest, Pair
from apb_ds.tasks.lm_eval.split import Split
from apb_ds.tasks.queue import AnswerQueue
from apb_ds.tasks.template import with_template


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
    sequences : int
        Answers that are decoded, or continuations that are scored, together. Their documents are in memory at the same
        time, as far as there is room. Answers do not depend on it: each that is sampled has a seed drawn from torch's
        generator on the first rank.

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
        sequences: int = 8,
    ) -> None:
        super().__init__(with_template(tokenizer, None, template), split, query_start)
        check_integer("sequences", sequences, 1)
        self.engine = engine
        self.sequences = sequences
        self._query_position = query_position

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers to the harness's requests, in order."""
        ours = [self.generation(*request.args) for request in requests]
        answers = [""] * len(ours)
        for index, answered in self._answered(ours, disable_tqdm):
            answers[index] = answered.answers[0]
            self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Raise NotImplementedError."""
        raise NotImplementedError(f"loglikelihood_rolling is not supported: {NO_ROLLING}")

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        ours = self.scorings(requests)
        starts = [0, *itertools.accumulate(len(one.continuations) for one in ours)]
        answers: list[Any] = [None] * len(requests)
        for index, answered in self._answered(ours, disable_tqdm):
            for place, answer in enumerate(answered.answers, start=starts[index]):
                answers[place] = answer
                self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
        return answers

    def _answered(self, requests: list[HarnessRequest], disable_tqdm: bool) -> Iterator[tuple[int, Asked]]:
        """Yield the requests with their index in the order in which they were answered."""
        from tqdm import tqdm

        self._check_same(requests)
        seeds = self._draw_seeds(requests)
        shown = self.engine.group.is_first and not disable_tqdm
        before = self.engine.apb_config
        try:
            with (
                AnswerQueue(self.engine, self.sequences) as queue,
                tqdm(total=len(requests), disable=not shown, desc="APB") as bar,
            ):
                for index, request in enumerate(requests):
                    self._set_position(request)
                    for asked in self._ask(queue, request, Asked(request, index), seeds[index]):
                        bar.update()
                        yield asked.owner, asked
                while len(queue):
                    for asked in _step(queue):
                        bar.update()
                        yield asked.owner, asked
        finally:
            if self.engine.apb_config is not before:
                self.engine.configure(before)

    def _ask(
        self, queue: AnswerQueue, request: HarnessRequest, asked: Asked, seeds: list[int | None]
    ) -> Iterator[Asked]:
        """Ask a request; yield those that were answered meanwhile, this one perhaps among them."""
        context = None
        if needs_prefill(self.engine, queue, request):
            while not queue.has_room(plan_of(self.engine, request)):
                yield from _step(queue)
            while (context := prefill(queue, request)) is None:
                while len(queue):
                    yield from _step(queue)
        ask(self.engine, queue, self.tokenizer, asked, context, seeds)
        if asked.is_done:
            yield asked
        while queue.is_full:
            yield from _step(queue)

    def _draw_seeds(self, requests: list[HarnessRequest]) -> list[list[int | None]]:
        """Return a seed for each answer that is sampled, drawn from torch's generator on the first rank."""
        drawn = [
            [int(torch.randint(2**63 - 1, ())) if one.generate.get("do_sample") else None for _ in range(one.repeats)]
            for one in requests
        ]
        return self.engine.group.gather_objects(drawn)[0]

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


def _step(queue: AnswerQueue) -> list[Asked]:
    """Go on; return the requests that were answered."""
    taken = []
    for ended in queue.step():
        asked, _ = ended.question.tag
        asked.take(ended)
        if asked.is_done:
            taken.append(asked)
    return taken
