"""A job with many questions: lines of one file answered into another, one prefill for each document."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apb_ds.attention import APBAttention
from apb_ds.engine.context import Context
from apb_ds.hf.architecture import check_positions
from apb_ds.report.answers import AnswerFile
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.progress import BatchProgress, batch_progress
from apb_ds.report.record import rate
from apb_ds.session.request import Run, gather_numbers, usage_metrics
from apb_ds.session.steps import JobError
from apb_ds.tasks.batch import BatchConfig
from apb_ds.tasks.lines import Line, group_lines, read_document, read_lines
from apb_ds.tasks.prompt import needs_tokenizer
from apb_ds.tasks.prompts import encode_document, encode_embedded, encode_query

logger = logging.getLogger(__name__)


@dataclass
class _Query:
    """One question of a group, as the first rank sends it to the others."""

    index: int
    id: str
    ids: list[int]
    embedded: list[int]
    max_new_tokens: int


@dataclass
class _Group:
    """Consecutive questions about one document.

    Attributes
    ----------
    num_tokens : of the document
    embeds_query : whether the prefill's anchor gets the first query: it is the only one then
    max_positions : that the longest of the questions needs, answered before or not
    queries : those still to be answered
    """

    num_tokens: int
    query_position: int
    embeds_query: bool
    max_positions: int
    queries: list[_Query]


@dataclass
class _Tally:
    """What this rank has done so far."""

    prefills: int = 0
    document_tokens: int = 0
    prefill_s: float = 0.0
    answered: int = 0
    query_tokens: int = 0
    new_tokens: int = 0
    query_s: float = 0.0
    decode_s: float = 0.0
    exact: int = 0
    failures: list[str] = field(default_factory=list)  # on the first rank


def serve_batch(run: Run) -> dict[str, Any]:
    """Answer what is not answered yet; return the job's parts of the record, the same on every rank."""
    with contextlib.ExitStack() as stack:
        return _Batch(run, stack).serve()


class _Batch:
    def __init__(self, run: Run, stack: contextlib.ExitStack) -> None:
        assert isinstance(run.settings.task, BatchConfig)
        self.run = run
        self.task = run.settings.task
        self.stack = stack
        self.tally = _Tally()
        # On the first rank only:
        self.lines: list[Line] = []
        self.answers: AnswerFile | None = None
        self.progress: BatchProgress | None = None
        self._ids: Tensor | None = None
        self._reports: dict[int, str] = {}

    def serve(self) -> dict[str, Any]:
        run = self.run
        counts = run.steps.from_first(self._open)
        reset_peak_memory(run.loaded.device)
        sent_before = run.group.bytes_sent
        began = time.perf_counter()
        for number in range(counts["groups"]):
            self._serve_group(number)
        failures = run.steps.from_first(self._finish)
        sent = run.group.bytes_sent - sent_before
        metrics = self._metrics(counts, len(failures), time.perf_counter() - began)
        metrics |= usage_metrics(run.group, sent, peak_memory_bytes(run.loaded.device))
        error = None
        if failures:
            error = (
                f"{len(failures)} of {counts['lines']} lines failed: {failures[0]}"
                f"{' (and others; see the output)' if len(failures) > 1 else ''} Run again to try them again."
            )
        task = {
            "name": self.task.name,
            "input": self.task.input,
            "output": counts["output"],
            "correct": None,
            "failures": failures,
        }
        parts = {"task": task, "metrics": metrics, "exact": False, "method": run.settings.method.resolved()}
        return parts | ({} if error is None else {"status": "failed", "error": error})

    # --- the first rank's part: text, files, tokens ---------------------------------------------------------------

    def _open(self) -> dict[str, Any]:
        run, task = self.run, self.task
        needs_tokenizer(run.tokenizer, task.name)
        lines = read_lines(task.input_path)
        groups = group_lines(lines) if task.reuse_prefill else [[line] for line in lines]
        self._check_shared(groups)
        self.lines = lines
        places = {id(line): index for index, line in enumerate(lines)}
        self.groups = [[(places[id(line)], line) for line in group] for group in groups]
        output = task.output_path(run.job.run_dir if run.job.in_sweep else None)
        self.answers = self.stack.enter_context(
            AnswerFile(
                output,
                [(line.id, line.fingerprint) for line in lines],
                run.answer_settings(),
                overwrite=task.overwrite,
            )
        )
        kept = len(self.answers.kept)
        if kept:
            logger.info("%d of %d lines are answered in %s already.", kept, len(lines), output)
        if self.answers.changed:
            logger.warning("%d lines have changed since; answering them again.", len(self.answers.changed))
        self.progress = self.stack.enter_context(
            batch_progress(run.error_console, len(lines) - kept, self._work_bytes(self.answers.kept), "lines")
        )
        return {"groups": len(groups), "lines": len(lines), "resumed": kept, "output": str(output)}

    def _check_shared(self, groups: Sequence[Sequence[Line]]) -> None:
        """Refuse a compressor that scores with the query where several questions share a prefill."""
        if not APBAttention(self.run.settings.method).needs_query:
            return
        for group in groups:
            valid = [line for line in group if line.problem is None]
            if len(valid) > 1:
                raise ValueError(
                    f"method.compressor={self.run.settings.method.compressor} scores with the query, and lines "
                    f"{valid[0].number} and {valid[1].number} would share one prefill; set task.reuse_prefill=false, "
                    "or use another compressor."
                )

    def _work_bytes(self, kept: dict[int, Any]) -> int:
        """Return the bytes of all documents that must be prefilled."""
        return sum(
            group[0][1].document_bytes
            for group in self.groups
            if any(index not in kept and line.problem is None for index, line in group)
        )

    def _prepare(self, number: int) -> _Group | None:
        """Encode the group's document and questions; None if nothing of it is left to do."""
        run, task = self.run, self.task
        assert self.answers is not None
        left = [(index, line) for index, line in self.groups[number] if index not in self.answers.kept]
        self._reports = {index: line.problem for index, line in left if line.problem is not None}
        valid = [(index, line) for index, line in self.groups[number] if line.problem is None]
        if not any(index not in self._reports for index, _ in left):
            return None
        try:
            text = read_document(task.input_path, valid[0][1])
            document = encode_document(run.tokenizer, text, allow_special=task.allow_special_tokens)
        except ValueError as error:
            run.steps.say_trace()
            self._reports |= {index: str(error) for index, _ in left if index not in self._reports}
            return None
        queries, longest = [], 0
        for index, line in valid:
            new_tokens = line.max_new_tokens or task.max_new_tokens
            try:
                ids = encode_query(run.tokenizer, document, line.query)
                embedded = encode_embedded(run.tokenizer, document, line.query)
                positions = len(document.ids) + len(ids) + new_tokens
                check_positions(run.loaded.model, positions)
            except ValueError as error:
                self._reports[index] = str(error)
                continue
            longest = max(longest, positions)
            if index not in self.answers.kept:
                queries.append(_Query(index, str(line.id), ids, embedded, new_tokens))
        if not queries:
            return None
        self._ids = torch.tensor([document.ids])
        return _Group(len(document.ids), document.query_position, len(valid) == 1, longest, queries)

    def _append(self, index: int, **result: Any) -> None:
        """Write a line's result and move the bar; lines before it in the group that could not be asked come first."""
        assert self.answers is not None and self.progress is not None
        self._append_reports(index)
        line = self.lines[index]
        if "error" in result:
            self.tally.failures.append(f"line {line.number} (id {line.id}): {result['error']}")
        self.answers.append(index, {"line": line.number, **result})
        self.progress.line_done(failed="error" in result)

    def _append_reports(self, before: int | None = None) -> None:
        for index in sorted(self._reports):
            if before is None or index < before:
                self._append(index, error=self._reports.pop(index))

    def _finish(self) -> list[str]:
        assert self.answers is not None
        self.answers.finish()
        return self.tally.failures

    # --- what all ranks do together ----------------------------------------------------------------------------------

    def _serve_group(self, number: int) -> None:
        run = self.run
        group = run.steps.from_first(lambda: self._prepare(number))
        if group is not None:
            document_ids = run.steps.ids_from_first(self._ids, group.num_tokens, run.loaded.device)
            try:
                context = run.steps.together(lambda: self._prefill(group, document_ids))
            except JobError as error:
                self._fail(group, str(error))
            else:
                self._answer_all(group, context)
        run.steps.from_first(self._append_reports)

    def _fail(self, group: _Group, why: str) -> None:
        def append() -> None:
            for query in group.queries:
                self._append(query.index, error=why)

        self.run.steps.from_first(append)

    def _prefill(self, group: _Group, document_ids: Tensor) -> Context:
        run = self.run
        query_ids = self._tensor(group.queries[0].embedded) if group.embeds_query else None
        run.set_up(group.query_position, group.num_tokens, 0 if query_ids is None else query_ids.shape[1])
        report, num_bytes = None, 0
        if self.progress is not None:
            num_bytes = self.lines[group.queries[0].index].document_bytes
            report = self.progress.prefill(num_bytes)
        context = run.engine.prefill(document_ids, query_ids, max_positions=group.max_positions, progress=report)
        if self.progress is not None:
            self.progress.prefilled(group.num_tokens, num_bytes)
        self.tally.prefills += 1
        self.tally.document_tokens += group.num_tokens
        self.tally.prefill_s += context.prefill_s
        self.tally.exact += int(context.plan.exact)
        return context

    def _answer_all(self, group: _Group, context: Context) -> None:
        steps = self.run.steps
        for place, query in enumerate(group.queries):
            try:
                result = steps.together(functools.partial(self._answer, context, query))
            except JobError as error:
                result = {"error": str(error)}
            else:
                result |= {
                    "document_tokens": group.num_tokens,
                    "prefill_s": context.prefill_s if place == 0 else 0.0,
                    "exact": context.plan.exact,
                }
                result["seconds"] = result["query_s"] + result["decode_s"] + result["prefill_s"]
                result |= {name: round(value, 4) for name, value in result.items() if isinstance(value, float)}
            steps.from_first(functools.partial(self._append, query.index, **result))

    def _answer(self, context: Context, query: _Query) -> dict[str, Any]:
        run = self.run
        run.seed_everything(query.id)
        answer = run.answer(context, self._tensor(query.ids), query.max_new_tokens, self.task.generate_arguments())
        tally = self.tally
        tally.answered += 1
        tally.query_tokens += len(query.ids)
        tally.new_tokens += len(answer.tokens)
        tally.query_s += answer.query_s
        tally.decode_s += answer.decode_s
        return {
            "answer": run.text_of(answer.tokens),
            "query_tokens": len(query.ids),
            "new_tokens": len(answer.tokens),
            "query_s": answer.query_s,
            "decode_s": answer.decode_s,
        }

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.run.loaded.device)

    def _metrics(self, counts: dict[str, Any], failed: int, seconds: float) -> dict[str, Any]:
        tally = self.tally
        prefill_s = max(gather_numbers(self.run.group, prefill_s=tally.prefill_s)["prefill_s"])
        return {
            "lines": counts["lines"],
            "resumed": counts["resumed"],
            "answered": tally.answered,
            "failed": failed,
            "prefills": tally.prefills,
            "exact_prefills": tally.exact,
            "document_tokens": tally.document_tokens,
            "query_tokens": tally.query_tokens,
            "new_tokens": tally.new_tokens,
            "hosts": self.run.settings.method.hosts,
            "ranks": self.run.group.world_size,
            "prefill_s": prefill_s,
            "prefill_tokens_per_s": rate(tally.document_tokens, prefill_s),
            "query_s": tally.query_s,
            "decode_s": tally.decode_s,
            "decode_tokens_per_s": rate(tally.new_tokens - tally.answered, tally.decode_s),
            "seconds": seconds,
        }
