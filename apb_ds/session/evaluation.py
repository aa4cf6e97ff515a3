"""A job that scores a method on a task's samples: every answer as JSONL, a summary as JSON, a table and a figure."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb_ds.engine.context import Context
from apb_ds.engine.decoding import RequestStats
from apb_ds.report.figures import draw_scores
from apb_ds.report.record import environment, write_json
from apb_ds.report.results import FIGURE_NAME, SAMPLES_NAME, SUMMARY_NAME
from apb_ds.report.summary import summarise
from apb_ds.session.active_job import ActiveJob
from apb_ds.session.fidelity import distance, predict, predict_exactly
from apb_ds.session.job import EvalConfig
from apb_ds.session.metrics import count_prefill
from apb_ds.session.series import QuestionSeries
from apb_ds.session.steps import JobError
from apb_ds.tasks import FidelityConfig, Sample, TaskConfig
from apb_ds.tasks.queue import Ended, Question
from apb_ds.tasks.text import expand_path

OUTPUT_ROOT = Path("outputs/results")
DIGEST_LENGTH = 10


@dataclass
class _Asked:
    """A sample that was asked about.

    Attributes
    ----------
    flops : see `count_prefill`
    """

    index: int
    prefill_s: float
    exact: bool
    flops: dict[str, Any] | None


class Evaluation(QuestionSeries):
    """The samples of a task, answered and scored.

    Attributes
    ----------
    samples : those of the task, on the first rank only
    output : the directory of the results, on the first rank only
    """

    unit = "samples"
    section = "eval"

    def __init__(self, job: ActiveJob, task: TaskConfig, config: EvalConfig) -> None:
        super().__init__(job)
        self.task = task
        self.config = config
        self.sequences = config.sequences
        self.samples: list[Any] = []
        self.output = Path()

    def _serve(self) -> dict[str, Any]:
        job = self.job
        left = job.steps.from_first(self._open)
        usage = job.track_usage()
        for index in left:
            self._serve_sample(index)
        self._answer_asked()
        used = usage.metrics() | self._answer_times()
        summary = job.steps.from_first(lambda: self._finish(used))
        numbers = summary["all"]
        failed = numbers["failed"]
        parts: dict[str, Any] = {
            "task": {"name": self.task.name, "directory": summary["output"], "correct": None},
            "metrics": {**numbers, **used, "cells": summary["cells"], "resumed": summary["resumed"]},
            "exact": job.settings.method.is_exact_method,
            "method": job.settings.method.resolved(),
        }
        if failed:
            error = f"{failed} of {numbers['samples']} samples failed; {SAMPLES_NAME} says why. Run again to retry."
            parts |= {"status": "failed", "error": error}
        return parts

    # --- the first rank's part ---------------------------------------------------------------------------------------

    def _open(self) -> list[int]:
        """Make the samples and open the output; return the indices of those without a score."""
        job = self.job
        self.samples = self._make_samples()
        if not self.samples:
            raise ValueError(f"task={self.task.name} has no samples with these settings.")
        settings = json.dumps(job.answer_settings(), sort_keys=True, default=str)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:DIGEST_LENGTH]
        default = OUTPUT_ROOT / f"{self.task.name}-{self._method_name}-{digest}"
        self.output = expand_path("eval.output", self.config.output) if self.config.output else default
        left = self._open_answers(self.output / SAMPLES_NAME, self._keys(), overwrite=self.config.overwrite)
        self._show_progress(len(left), sum(self._document_tokens(index) for index in left))
        return left

    @property
    def _method_name(self) -> str:
        return self.job.settings.method.settings.method

    def _make_samples(self) -> list[Any]:
        job = self.job
        task = self.task.fitted(job.max_positions)
        return list(task.samples(job.chat_tokenizer, job.vocab_size, job.settings.seed))

    def _keys(self) -> list[tuple[str, str]]:
        """Return each sample's id, and a hash of what is asked."""
        return [(f"{self.task.name}-{index}", _prompt_digest(sample)) for index, sample in enumerate(self.samples)]

    def _document_tokens(self, index: int) -> int:
        return self.samples[index].num_document

    def _further_results(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the summary contains besides scores and usage."""
        return {}

    def _append(self, index: int, result: dict[str, Any]) -> None:
        sample = self.samples[index]
        if "answer" in result:
            result["score"] = self.task.score(sample, result["answer"])
        reference = list(sample.answers) or sample.ground_truth
        lengths = {"document_tokens": sample.num_document, "query_tokens": sample.num_query}
        self._write(index, {"labels": sample.labels, "reference": reference, **lengths, **sample.notes, **result})

    def _finish(self, usage: dict[str, Any]) -> dict[str, Any]:
        resumed = len(self.answers.kept)
        self.answers.finish()
        lines = (self.output / SAMPLES_NAME).read_text(encoding="utf-8").splitlines()
        approximate = not self.job.settings.method.is_exact_method
        results = [{**json.loads(line), "approximate": approximate} for line in lines]
        summary = summarise(results)
        content = {
            "task": self.task.name,
            "settings": self.job.answer_settings(),
            **summary,
            **self._further_results(results),
            "usage": usage,
            **environment(self.job.loaded.device),
        }
        write_json(self.output / SUMMARY_NAME, content)
        draw_scores(self.output / FIGURE_NAME, f"{self.task.name}: {self._method_name}", summary["cells"])
        return {**summary, "output": str(self.output), "resumed": resumed}

    def _answer_times(self) -> dict[str, float]:
        """Return the seconds of all queries' forwards and of all decode steps on this rank."""
        stats = RequestStats() if self._opened is None else self._opened.stats
        return {"query_s": stats.query_s, "decode_s": stats.decode_s}

    # --- what all ranks do together ----------------------------------------------------------------------------------

    def _serve_sample(self, index: int) -> None:
        sample = self.job.sample_from_first(lambda: self.samples[index])
        if isinstance(self.task, FidelityConfig):
            self._append_together(index, self._result_of(functools.partial(self._compare, sample, index)))
            return
        try:
            self._ask_about(sample, index)
        except JobError as error:
            self._append_together(index, {"error": str(error)})

    def _append_together(self, index: int, result: dict[str, Any]) -> None:
        self.job.steps.from_first(functools.partial(self._append, index, result))

    def _compare(self, sample: Sample, index: int) -> dict[str, Any]:
        """Compare with exact attention, which gives measures instead of an answer."""
        began = time.perf_counter()
        job, num_judged = self.job, sample.num_query
        num_tokens = sample.num_document
        shares = num_tokens // 2, num_tokens - num_tokens // 2  # of the bar: the document is prefilled twice
        expected = predict_exactly(job, sample, self._prefill_report(shares[0]))
        self._prefilled(num_tokens, shares[0])
        context, found = predict(job, sample, self._prefill_report(shares[1]))
        self._prefilled(num_tokens, shares[1])
        measures = distance(found, expected, sample.query_ids)
        per_layer = measures.pop("attention_errors")
        return {
            "answer": "",
            "exact": context.plan.exact,
            "measures": measures,
            "attention_errors": per_layer,
            "flops": count_prefill(job.engine, context, num_judged, num_logits=num_judged),
            "prefill_s": round(context.prefill_s, 4),
            "seconds": round(time.perf_counter() - began, 4),
        }

    def _ask_about(self, sample: Sample, index: int) -> None:
        job = self.job
        job.steps.together(lambda: job.set_up_for(sample))
        num_document = sample.num_document

        def prefill() -> Context | None:
            return self._queue.prefill(
                sample.document_ids,
                sample.anchor_query_ids,
                max_positions=sample.num_positions,
                progress=self._prefill_report(num_document),
            )

        context = self._prefill(job.plan(num_document, sample.anchor_query_ids.shape[1]), prefill)
        self._prefilled(num_document, num_document)
        flops = count_prefill(job.engine, context, sample.num_query)
        self._ask(
            Question(
                sample.query_ids,
                context,
                max_new_tokens=sample.max_new_tokens,
                seed=job.seed_of(f"{self.task.name}-{index}"),
                arguments=job.generate_arguments(sample.generate),
                tag=_Asked(index, context.prefill_s, context.plan.exact, flops),
            )
        )

    def _take(self, ended: Ended) -> None:
        result = self._result_of(functools.partial(self._answered, ended), local=True)
        self._append_together(ended.question.tag.index, result)

    def _answered(self, ended: Ended) -> dict[str, Any]:
        if ended.error is not None:
            raise ended.error
        asked: _Asked = ended.question.tag
        return {
            "answer": self.job.text_of(ended.tokens),
            "exact": asked.exact,
            "new_tokens": len(ended.tokens),
            "flops": asked.flops,
            "prefill_s": round(asked.prefill_s, 4),
            "seconds": round(asked.prefill_s + ended.query_s + ended.share_s, 4),
        }


def _prompt_digest(sample: Sample) -> str:
    """Return a hash of what is asked: ids, their boundary, and how the answer is generated."""
    digest = hashlib.sha256()
    for ids in (sample.document_ids, sample.query_ids, sample.anchor_query_ids):
        digest.update(ids.numpy().tobytes())
        digest.update(b"|")
    digest.update(json.dumps([sample.max_new_tokens, sample.generate], sort_keys=True, default=str).encode())
    return digest.hexdigest()
