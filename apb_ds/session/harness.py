"""A job that has lm-evaluation-harness build and score what the engine answers: the first rank alone runs it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from typing import Any

from apb_ds.session.evaluation import Evaluation
from apb_ds.session.request import Run
from apb_ds.session.steps import JobError
from apb_ds.tasks import LmEvalConfig


def serve_harness(run: Run) -> dict[str, Any]:
    """Answer and score the documents that have no score yet; return the job's parts of the record."""
    with contextlib.ExitStack() as stack:
        return HarnessEvaluation(run, stack).serve()


class HarnessEvaluation(Evaluation):
    """An evaluation whose samples are the harness' documents, each with one request or several."""

    tasks: Any = None  # the first rank's, with the samples

    # --- the first rank's part ---------------------------------------------------------------------------------------

    def _make_samples(self) -> list[Any]:
        from apb_ds.tasks.lm_eval.documents import build

        assert isinstance(self.task, LmEvalConfig)
        if self.run.tokenizer is None:
            raise ValueError("task=lm_eval needs a tokenizer, and none is at hand; set model.tokenizer to where it is.")
        self.tasks = build(self.task, self.run.tokenizer, self.run.settings.seed)
        return self.tasks.samples

    def _keys(self) -> list[tuple[str, str]]:
        from apb_ds.tasks.lm_eval.model import request_parts

        keys = []
        for sample in self.samples:
            parts = [request_parts(request) for request in sample.requests]
            keys.append((sample.key, hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()))
        return keys

    def _document_tokens(self, index: int) -> int:
        return sum(request.document_ids.shape[1] for request in self.samples[index].requests)

    def _num_requests(self, index: int) -> int:
        sample = self.samples[index]
        if sample.problem is not None:
            raise ValueError(sample.problem)
        return len(sample.requests)

    def _append(self, index: int, result: dict[str, Any]) -> None:
        assert self.answers is not None and self.progress is not None
        sample = self.samples[index]
        if "answer" in result:
            result["score"], result["metrics"] = self.tasks.score(sample, result["answer"])
            # One answer to one prompt is easier to read as it is.
            if len(result["answer"]) == 1 and isinstance(result["answer"][0], str):
                result["answer"] = result["answer"][0]
        num_query = sum(request.query_ids.shape[1] for request in sample.requests)
        lengths = {"document_tokens": self._document_tokens(index), "query_tokens": num_query}
        labels = {"task": sample.task}
        self.answers.append(index, {"labels": labels, "reference": sample.reference, **lengths, **result})
        self.progress.line_done(failed="error" in result)

    def _further_results(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the harness reports, of all documents that have an answer."""
        from apb_ds.tasks.ruler.harness import harness_version

        samples = {sample.key: sample for sample in self.samples}
        answered = [(samples[result["id"]], _as_list(result["answer"])) for result in results if "answer" in result]
        return {"harness": {"version": harness_version(), **self.tasks.results(answered)}}

    # --- what all ranks do together ----------------------------------------------------------------------------------

    def _serve_sample(self, index: int) -> None:
        steps = self.run.steps
        try:
            num_requests = steps.from_first(lambda: self._num_requests(index))
            responses = [self._serve_request(index, place) for place in range(num_requests)]
            result = _joined(responses)
        except JobError as error:
            result = {"error": str(error)}
        steps.from_first(functools.partial(self._append, index, result))

    def _serve_request(self, index: int, place: int) -> Any:
        request = self.run.sample_from_first(lambda: self.samples[index].requests[place])
        return self.run.steps.together(functools.partial(self._respond, request, f"{self.task.name}-{index}-{place}"))

    def _respond(self, request: Any, salt: str) -> Any:
        from apb_ds.tasks.lm_eval.model import respond

        run = self.run
        num_document, num_query = request.document_ids.shape[1], request.query_ids.shape[1]
        if num_document:
            run.set_up(request.query_position, num_document, num_query)
        else:
            run.engine = run.make_engine(run.settings.method)
        run.seed_everything(salt)
        report = None if self.progress is None else self.progress.prefill(num_document)
        response = respond(run.engine, run.tokenizer, request, report)
        if self.progress is not None:
            self.progress.prefilled(num_document, num_document)
        return response


def _joined(responses: list[Any]) -> dict[str, Any]:
    """Return the result of a document of the responses to its requests."""
    return {
        "answer": [answer for response in responses for answer in response.answers],
        "exact": all(response.exact for response in responses),
        "new_tokens": sum(response.new_tokens for response in responses),
        "prefill_s": round(sum(response.prefill_s for response in responses), 4),
        "seconds": round(sum(response.seconds for response in responses), 4),
    }


def _as_list(answer: Any) -> list[Any]:
    return [answer] if isinstance(answer, str) else answer
