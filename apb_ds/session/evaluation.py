"""A job that scores a method on a task's samples: every answer as JSONL, a summary as JSON, a table and a figure."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from apb_ds.report.answers import AnswerFile
from apb_ds.report.figures import draw_scores
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.progress import BatchProgress, batch_progress
from apb_ds.report.record import environment, write_json
from apb_ds.report.results import FIGURE_NAME, SAMPLES_NAME, SUMMARY_NAME
from apb_ds.report.summary import summarise
from apb_ds.session.fidelity import compare_with_exact
from apb_ds.session.request import Run, count_prefill, usage_metrics
from apb_ds.session.steps import JobError
from apb_ds.tasks import FidelityConfig, Sample

logger = logging.getLogger(__name__)

OUTPUT_ROOT = Path("outputs/results")
DIGEST_LENGTH = 10


def serve_evaluation(run: Run) -> dict[str, Any]:
    """Answer and score the samples that have no score yet; return the job's parts of the record.

    A sample that fails is counted, and the rest goes on. The same job again goes on where it was stopped.
    """
    with contextlib.ExitStack() as stack:
        return Evaluation(run, stack).serve()


class Evaluation:
    """One evaluation: `samples` are those of the task, on the first rank alone."""

    def __init__(self, run: Run, stack: contextlib.ExitStack) -> None:
        self.run = run
        self.task = run.settings.task
        self.stack = stack
        # On the first rank only:
        self.samples: list[Any] = []
        self.answers: AnswerFile | None = None
        self.progress: BatchProgress | None = None
        self.output = Path()

    def serve(self) -> dict[str, Any]:
        run = self.run
        left = run.steps.from_first(self._open)
        reset_peak_memory(run.loaded.device)
        sent_before = run.group.bytes_sent
        for index in left:
            self._serve_sample(index)
        sent = run.group.bytes_sent - sent_before
        usage = usage_metrics(run.group, sent, peak_memory_bytes(run.loaded.device))
        summary = run.steps.from_first(lambda: self._finish(usage))
        numbers = summary["all"]
        failed = numbers["failed"]
        parts: dict[str, Any] = {
            "task": {"name": self.task.name, "directory": summary["output"], "correct": None},
            "metrics": {**numbers, **usage, "cells": summary["cells"], "resumed": summary["resumed"]},
            "exact": run.settings.method.is_exact_method,
            "method": run.settings.method.resolved(),
        }
        if failed:
            error = f"{failed} of {numbers['samples']} samples failed; {SAMPLES_NAME} says why. Run again to try again."
            parts |= {"status": "failed", "error": error}
        return parts

    # --- the first rank's part ---------------------------------------------------------------------------------------

    def _open(self) -> list[int]:
        """Make the samples and open the output; return the places of those that have no score yet."""
        run, evaluation = self.run, self.run.settings.evaluation
        assert evaluation is not None
        self.samples = self._make_samples()
        if not self.samples:
            raise ValueError(f"task={self.task.name} has no samples with these settings.")
        settings = run.answer_settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        name = f"{self.task.name}-{run.settings.method.method}-{digest[:DIGEST_LENGTH]}"
        self.output = Path(evaluation.output).expanduser() if evaluation.output else OUTPUT_ROOT / name
        answers = AnswerFile(self.output / SAMPLES_NAME, self._keys(), settings, overwrite=evaluation.overwrite)
        self.answers = self.stack.enter_context(answers)
        left = [index for index in range(len(self.samples)) if index not in self.answers.kept]
        if len(left) < len(self.samples):
            logger.info("%d of %d samples are answered already.", len(self.samples) - len(left), len(self.samples))
        num_tokens = sum(self._document_tokens(index) for index in left)
        self.progress = self.stack.enter_context(batch_progress(run.error_console, len(left), num_tokens, "samples"))
        return left

    def _make_samples(self) -> list[Any]:
        run = self.run
        task = self.task.fitted(getattr(run.loaded.model.config, "max_position_embeddings", None))
        return list(task.samples(run.tokenizer, run.vocab_size, run.settings.seed))

    def _keys(self) -> list[tuple[str, str]]:
        """Return each sample's name, and a hash of what is asked."""
        return [(f"{self.task.name}-{index}", _prompt_digest(sample)) for index, sample in enumerate(self.samples)]

    def _document_tokens(self, index: int) -> int:
        return self.samples[index].document_ids.shape[1]

    def _further_results(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the summary has besides scores and usage."""
        return {}

    def _append(self, index: int, result: dict[str, Any]) -> None:
        assert self.answers is not None and self.progress is not None
        sample = self.samples[index]
        if "answer" in result:
            result["score"] = self.task.score(sample, result["answer"])
        reference = list(sample.answers) or sample.ground_truth
        lengths = {"document_tokens": sample.document_ids.shape[1], "query_tokens": sample.query_ids.shape[1]}
        self.answers.append(
            index, {"labels": sample.labels, "reference": reference, **lengths, **sample.notes, **result}
        )
        self.progress.line_done(failed="error" in result)

    def _finish(self, usage: dict[str, Any]) -> dict[str, Any]:
        assert self.answers is not None
        resumed = len(self.answers.kept)
        self.answers.finish()
        lines = (self.output / SAMPLES_NAME).read_text(encoding="utf-8").splitlines()
        approximate = not self.run.settings.method.is_exact_method
        results = [{**json.loads(line), "approximate": approximate} for line in lines]
        summary = summarise(results)
        content = {
            "task": self.task.name,
            "settings": self.run.answer_settings(),
            **summary,
            **self._further_results(results),
            "usage": usage,
            **environment(self.run.loaded.device),
        }
        write_json(self.output / SUMMARY_NAME, content)
        title = f"{self.task.name}: {self.run.settings.method.method}"
        draw_scores(self.output / FIGURE_NAME, title, summary["cells"])
        return {**summary, "output": str(self.output), "resumed": resumed}

    # --- what all ranks do together ----------------------------------------------------------------------------------

    def _serve_sample(self, index: int) -> None:
        steps = self.run.steps
        sample = self.run.sample_from_first(lambda: self.samples[index])
        work = self._compare if isinstance(self.task, FidelityConfig) else self._ask
        try:
            result = steps.together(functools.partial(work, sample, index))
        except JobError as error:
            result = {"error": str(error)}
        steps.from_first(functools.partial(self._append, index, result))

    def _compare(self, sample: Sample, index: int) -> dict[str, Any]:
        """Compare with exact attention: there is no answer, but measures."""
        began = time.perf_counter()
        run, num_judged = self.run, sample.query_ids.shape[1]
        context, measures = compare_with_exact(run, sample)
        if self.progress is not None:
            self.progress.prefilled(2 * context.plan.num_tokens, context.plan.num_tokens)
        per_layer = measures.pop("attention_errors")
        return {
            "answer": "",
            "exact": context.plan.exact,
            "measures": measures,
            "attention_errors": per_layer,
            "flops": count_prefill(run.engine, context, num_judged, num_logits=num_judged),
            "prefill_s": round(context.prefill_s, 4),
            "seconds": round(time.perf_counter() - began, 4),
        }

    def _ask(self, sample: Sample, index: int) -> dict[str, Any]:
        run = self.run
        num_document, num_query = sample.document_ids.shape[1], sample.query_ids.shape[1]
        run.set_up(sample.query_position, num_document, sample.anchor_query_ids.shape[1])
        run.seed_everything(f"{self.task.name}-{index}")
        report = None if self.progress is None else self.progress.prefill(num_document)
        positions = num_document + num_query + sample.max_new_tokens
        context = run.engine.prefill(
            sample.document_ids, sample.anchor_query_ids, max_positions=positions, progress=report
        )
        if self.progress is not None:
            self.progress.prefilled(num_document, num_document)
        answer = run.answer(context, sample.query_ids, sample.max_new_tokens, sample.generate)
        return {
            "answer": run.text_of(answer.tokens),
            "exact": context.plan.exact,
            "new_tokens": len(answer.tokens),
            "flops": count_prefill(run.engine, context, num_query),
            "prefill_s": round(context.prefill_s, 4),
            "seconds": round(context.prefill_s + answer.query_s + answer.decode_s, 4),
        }


def _prompt_digest(sample: Sample) -> str:
    """Return a hash of what is asked: ids, their boundary, and how the answer is generated."""
    digest = hashlib.sha256()
    for ids in (sample.document_ids, sample.query_ids, sample.anchor_query_ids):
        digest.update(ids.numpy().tobytes())
        digest.update(b"|")
    digest.update(json.dumps([sample.max_new_tokens, sample.generate], sort_keys=True, default=str).encode())
    return digest.hexdigest()
