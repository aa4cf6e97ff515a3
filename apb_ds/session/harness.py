"""A job whose prompts lm-evaluation-harness builds and whose answers it scores; it runs on the first rank only."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from apb_ds.session.evaluation import Evaluation
from apb_ds.session.steps import JobError
from apb_ds.tasks import LmEvalConfig
from apb_ds.tasks.base import needs_tokenizer


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
            num_requests = steps.from_first(lambda: self._num_requests(index))
            result = _joined([self._serve_request(index, number) for number in range(num_requests)])
        except JobError as error:
            result = {"error": str(error)}
        steps.from_first(functools.partial(self._append, index, result))

    def _serve_request(self, index: int, number: int) -> Any:
        request: Any = self.job.sample_from_first(lambda: self.samples[index].requests[number])
        return self.job.steps.together(lambda: self._respond(request, f"{self.task.name}-{index}-{number}"))

    def _respond(self, request: Any, salt: str) -> Any:
        from apb_ds.tasks.lm_eval.model import respond

        job = self.job
        if request.num_document:
            job.set_up_for(request)
        else:
            job.engine = job.make_engine(job.settings.method)
        job.seed_everything(salt)
        response = respond(job.engine, job.tokenizer, request, self._prefill_report(request.num_document))
        self._prefilled(request.num_document, request.num_document)
        return response


def _joined(responses: list[Any]) -> dict[str, Any]:
    """Return a document's result from the responses to its requests."""
    return {
        "answer": [answer for response in responses for answer in response.answers],
        "exact": all(response.exact for response in responses),
        "new_tokens": sum(response.new_tokens for response in responses),
        "prefill_s": round(sum(response.prefill_s for response in responses), 4),
        "seconds": round(sum(response.seconds for response in responses), 4),
    }


def _as_list(answer: Any) -> list[Any]:
    return [answer] if isinstance(answer, str) else answer
