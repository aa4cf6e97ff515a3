"""A job whose prompts lm-evaluation-harness builds and whose answers it scores; it runs on the first rank only."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from apb_ds.session.evaluation import Evaluation
from apb_ds.session.steps import JobError
from apb_ds.tasks import LmEvalConfig
from apb_ds.tasks.base import needs_tokenizer
from apb_ds.tasks.queue import Ended


class HarnessEvaluation(Evaluation):
    """An evaluation whose samples are the harness's documents, each with one request or several.

    Attributes
    ----------
    tasks : the harness's, on the first rank only
    """

    task: LmEvalConfig
    tasks: Any = None

    # --- the first rank's part ---------------------------------------------------------------------------------------

    def _make_samples(self) -> list[Any]:
        from apb_ds.tasks.lm_eval.documents import build

        tokenizer = needs_tokenizer(self.job.chat_tokenizer, self.task.name)
        self.tasks = build(self.task, tokenizer, self.job.settings.seed)
        return self.tasks.samples

    def _keys(self) -> list[tuple[str, str]]:
        keys = []
        for sample in self.samples:
            parts = [request.parts for request in sample.requests]
            keys.append((sample.key, hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()))
        return keys

    def _document_tokens(self, index: int) -> int:
        return sum(request.num_document for request in self.samples[index].requests)

    def _num_requests(self, index: int) -> int:
        sample = self.samples[index]
        if sample.problem is not None:
            raise ValueError(sample.problem)
        return len(sample.requests)

    def _request(self, index: int, number: int) -> Any:
        return self.samples[index].requests[number]

    def _append(self, index: int, result: dict[str, Any]) -> None:
        sample = self.samples[index]
        if "answer" in result:
            result["score"], result["metrics"] = self.tasks.score(sample, result["answer"])
            # A single text is easier to read without a list around it.
            if len(result["answer"]) == 1 and isinstance(result["answer"][0], str):
                result["answer"] = result["answer"][0]
        num_query = sum(request.num_query for request in sample.requests)
        lengths = {"document_tokens": self._document_tokens(index), "query_tokens": num_query}
        self._write(index, {"labels": {"task": sample.task}, "reference": sample.reference, **lengths, **result})

    def _further_results(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the harness reports of all documents that were answered."""
        from apb_ds.tasks.ruler.harness import harness_version

        samples = {sample.key: sample for sample in self.samples}
        answered = [(samples[result["id"]], _as_list(result["answer"])) for result in results if "answer" in result]
        return {"harness": {"version": harness_version(), **self.tasks.results(answered)}}

    # --- what all ranks do together ----------------------------------------------------------------------------------

    def _serve_sample(self, index: int) -> None:
        steps = self.job.steps
        try:
            sample = _Sample(index, steps.from_first(lambda: self._num_requests(index)))
        except JobError as error:
            self._append_together(index, {"error": str(error)})
            return
        for number in range(sample.num_requests):
            request = self.job.sample_from_first(functools.partial(self._request, index, number))
            try:
                self._ask_request(sample, request, f"{self.task.name}-{index}-{number}")
            except JobError as error:
                self._fail(sample, error)
            if sample.has_failed:
                return

    def _ask_request(self, sample: _Sample, request: Any, salt: str) -> None:
        from apb_ds.tasks.lm_eval.asking import Asked, ask, needs_prefill, plan_of, prefill

        job = self.job
        job.steps.together(lambda: self._set_up_for(request))
        queue, engine = self._queue, job.engine
        context = None
        if needs_prefill(engine, queue, request):
            num_document = request.num_document
            context = self._prefill(
                plan_of(engine, request), lambda: prefill(queue, request, self._prefill_report(num_document))
            )
            self._prefilled(num_document, num_document)
        asked = Asked(request, sample)
        sample.requests.append(asked)
        seeds = [job.seed_of(f"{salt}-{repeat}" if repeat else salt) for repeat in range(request.repeats)]
        job.steps.together(lambda: ask(engine, queue, job.tokenizer, asked, context, seeds))
        self._write_if_done(sample)
        while queue.is_full:
            self._go_on()

    def _set_up_for(self, request: Any) -> None:
        if request.num_document:
            self.job.set_up_for(request)
        else:
            self.job.engine = self.job.make_engine(self.job.settings.method)

    def _take(self, ended: Ended) -> None:
        asked, _ = ended.question.tag
        sample: _Sample = asked.owner
        if sample.has_failed:
            return
        try:
            self.job.steps.together(lambda: asked.take(ended), local=True)
        except JobError as error:
            self._fail(sample, error)
        else:
            self._write_if_done(sample)

    def _fail(self, sample: _Sample, error: JobError) -> None:
        if not sample.has_failed:
            sample.has_failed = True
            self._append_together(sample.index, {"error": str(error)})

    def _write_if_done(self, sample: _Sample) -> None:
        if sample.is_done:
            self._append_together(sample.index, _joined(sample.requests))


@dataclass
class _Sample:
    """A document of the harness whose requests are being answered.

    Attributes
    ----------
    requests : `Asked`, those asked so far
    """

    index: int
    num_requests: int
    requests: list[Any] = field(default_factory=list)
    has_failed: bool = False

    @property
    def is_done(self) -> bool:
        return len(self.requests) == self.num_requests and all(asked.is_done for asked in self.requests)


def _joined(requests: list[Any]) -> dict[str, Any]:
    """Return a document's result from its requests, once they are answered."""
    return {
        "answer": [answer for asked in requests for answer in asked.answers],
        "exact": all(asked.exact for asked in requests),
        "new_tokens": sum(asked.new_tokens for asked in requests),
        "prefill_s": round(sum(asked.prefill_s for asked in requests), 4),
        "seconds": round(sum(asked.seconds for asked in requests), 4),
    }


def _as_list(answer: Any) -> list[Any]:
    return [answer] if isinstance(answer, str) else answer
