"""A job with many questions: lines of one file answered into another, one prefill for each document."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from apb_ds.attention import APBAttention
from apb_ds.engine.context import Context
from apb_ds.hf.architecture import check_positions
from apb_ds.report.record import rate
from apb_ds.session.active_job import ActiveJob
from apb_ds.session.series import QuestionSeries
from apb_ds.session.steps import JobError, gather_numbers
from apb_ds.tasks import BatchConfig
from apb_ds.tasks.base import needs_tokenizer
from apb_ds.tasks.lines import Line, group_lines, read_document, read_lines
from apb_ds.tasks.prompts import encode_document, encode_embedded, encode_query


@dataclass
class _Query:
    """One question, as the first rank sends it to the others."""

    index: int
    id: str
    ids: list[int]
    embedded: list[int]
    max_new_tokens: int


@dataclass
class _DocumentQueries:
    """Consecutive questions about one document.

    Attributes
    ----------
    num_tokens : the document's tokens
    embeds_query : whether the anchor embeds the first query, because it is the only one
    max_positions : what the longest of the questions needs, answered before or not
    queries : those still to be answered
    """

    num_tokens: int
    query_position: int
    embeds_query: bool
    max_positions: int
    queries: list[_Query]


@dataclass
class _Totals:
    """What this rank has done so far, by the names in the record."""

    prefills: int = 0
    exact_prefills: int = 0
    document_tokens: int = 0
    prefill_s: float = 0.0
    answered: int = 0
    query_tokens: int = 0
    new_tokens: int = 0
    query_s: float = 0.0
    decode_s: float = 0.0


class Batch(QuestionSeries):
    """The questions of a file. Lines are indexed by their order in it."""

    def __init__(self, job: ActiveJob, task: BatchConfig) -> None:
        super().__init__(job)
        self.task = task
        self.totals = _Totals()
        # On the first rank only:
        self.lines: list[Line] = []
        self.groups: list[list[tuple[int, Line]]] = []
        self.failures: dict[int, str] = {}
        self._ids: Tensor | None = None

    def _serve(self) -> dict[str, Any]:
        job = self.job
        counts = job.steps.from_first(self._open)
        usage = job.track_usage()
        began = time.perf_counter()
        for number in range(counts["groups"]):
            self._serve_group(number)
        failures = job.steps.from_first(self._finish)
        metrics = self._metrics(counts, len(failures), time.perf_counter() - began) | usage.metrics()
        task = {
            "name": self.task.name,
            "input": self.task.input,
            "output": counts["output"],
            "correct": None,
            "failures": failures,
        }
        parts = {"task": task, "metrics": metrics, "exact": False, "method": job.settings.method.resolved()}
        if failures:
            others = " (and others; see the output)" if len(failures) > 1 else ""
            error = f"{len(failures)} of {counts['lines']} lines failed: {failures[0]}{others} Run again to retry them."
            parts |= {"status": "failed", "error": error}
        return parts

    # --- the first rank's part: text, files, tokens ---------------------------------------------------------------

    def _open(self) -> dict[str, Any]:
        job, task = self.job, self.task
        needs_tokenizer(job.chat_tokenizer, task.name)
        self.lines = read_lines(task.input_path)
        groups = group_lines(self.lines) if task.reuse_prefill else [[line] for line in self.lines]
        self._check_shared(groups)
        indices = {id(line): index for index, line in enumerate(self.lines)}
        self.groups = [[(indices[id(line)], line) for line in group] for group in groups]
        output = task.output_path(job.job.run_dir if job.job.in_sweep else None)
        keys = [(line.id, line.fingerprint) for line in self.lines]
        left = set(self._open_answers(output, keys, overwrite=task.overwrite))
        self._show_progress(
            len(left),
            sum(
                group[0][1].document_bytes
                for group in self.groups
                if any(index in left and line.problem is None for index, line in group)
            ),
        )
        num_lines = len(self.lines)
        return {
            "groups": len(groups),
            "lines": num_lines,
            "resumed": num_lines - len(left),
            "output": str(output),
        }

    def _check_shared(self, groups: Sequence[Sequence[Line]]) -> None:
        """Refuse a compressor that scores with the query if several questions share a prefill."""
        method = self.job.settings.method
        if not APBAttention(method).needs_query:
            return
        for group in groups:
            valid = [line for line in group if line.problem is None]
            if len(valid) > 1:
                raise ValueError(
                    f"method.compressor={method.compressor} scores with the query, but lines {valid[0].number} and "
                    f"{valid[1].number} would share one prefill; set task.reuse_prefill=false, or use another "
                    "compressor."
                )

    def _prepare(self, number: int) -> _DocumentQueries | None:
        """Encode a group's document and questions, and write those that cannot be asked; None if none are left."""
        group, kept = self.groups[number], self.answers.kept
        self._append_failures([index for index, line in group if index not in kept and line.problem is not None])
        valid = [(index, line) for index, line in group if line.problem is None]
        left = [index for index, _ in valid if index not in kept]
        if not left:
            return None
        try:
            text = read_document(self.task.input_path, valid[0][1])
            document = encode_document(self.job.chat_tokenizer, text, allow_special=self.task.allow_special_tokens)
        except ValueError as error:
            self.job.steps.print_trace()
            self._append_failures(left, str(error))
            return None
        queries, longest = [], 0
        for index, line in valid:
            new_tokens = line.max_new_tokens or self.task.max_new_tokens
            try:
                ids = encode_query(self.job.chat_tokenizer, document, line.query)
                embedded = encode_embedded(self.job.chat_tokenizer, document, line.query)
                positions = len(document.ids) + len(ids) + new_tokens
                check_positions(self.job.loaded.model, positions)
            except ValueError as error:
                self._append_failures([index] if index not in kept else [], str(error))
                continue
            longest = max(longest, positions)
            if index not in kept:
                queries.append(_Query(index, str(line.id), ids, embedded, new_tokens))
        if not queries:
            return None
        self._ids = document.tensor
        return _DocumentQueries(len(document.ids), document.query_position, len(valid) == 1, longest, queries)

    def _append(self, index: int, result: dict[str, Any]) -> None:
        """Write a line's result; `_finish` puts the output in order."""
        if "error" in result:
            self.failures[index] = f"line {self.lines[index].number} (id {self.lines[index].id}): {result['error']}"
        self._write(index, {"line": self.lines[index].number, **result})

    def _append_failures(self, indices: Sequence[int], why: str | None = None) -> None:
        """Write lines that failed; by default for their own problem."""
        for index in indices:
            self._append(index, {"error": why or self.lines[index].problem})

    def _finish(self) -> list[str]:
        self.answers.finish()
        return [why for _, why in sorted(self.failures.items())]

    # --- what all ranks do together ----------------------------------------------------------------------------------

    def _serve_group(self, number: int) -> None:
        steps = self.job.steps
        document = steps.from_first(lambda: self._prepare(number))
        if document is None:
            return
        document_ids = steps.ids_from_first(self._ids, document.num_tokens, self.job.device)
        try:
            context = steps.together(lambda: self._prefill(document, document_ids))
        except JobError as error:
            indices = [query.index for query in document.queries]
            steps.from_first(functools.partial(self._append_failures, indices, str(error)))
        else:
            self._answer_all(document, context)

    def _prefill(self, document: _DocumentQueries, document_ids: Tensor) -> Context:
        job = self.job
        first = document.queries[0]
        query_ids = self._tensor(first.embedded) if document.embeds_query else None
        job.set_up(document.query_position, document.num_tokens, 0 if query_ids is None else query_ids.shape[1])
        num_bytes = self.lines[first.index].document_bytes if job.is_first else 0
        report = self._prefill_report(num_bytes)
        context = job.engine.prefill(document_ids, query_ids, max_positions=document.max_positions, progress=report)
        self._prefilled(document.num_tokens, num_bytes)
        self.totals.prefills += 1
        self.totals.document_tokens += document.num_tokens
        self.totals.prefill_s += context.prefill_s
        self.totals.exact_prefills += int(context.plan.exact)
        return context

    def _answer_all(self, document: _DocumentQueries, context: Context) -> None:
        for position, query in enumerate(document.queries):
            result = self._result_of(functools.partial(self._answer, context, query))
            if "error" not in result:
                prefill_s = context.prefill_s if position == 0 else 0.0
                result |= {
                    "document_tokens": document.num_tokens,
                    "prefill_s": prefill_s,
                    "exact": context.plan.exact,
                    "seconds": result["query_s"] + result["decode_s"] + prefill_s,
                }
                result |= {name: round(value, 4) for name, value in result.items() if isinstance(value, float)}
            self.job.steps.from_first(functools.partial(self._append, query.index, result))

    def _answer(self, context: Context, query: _Query) -> dict[str, Any]:
        job, totals = self.job, self.totals
        job.seed_everything(query.id)
        answer = job.answer(context, self._tensor(query.ids), query.max_new_tokens, self.task.generate_arguments())
        totals.answered += 1
        totals.query_tokens += len(query.ids)
        totals.new_tokens += len(answer.tokens)
        totals.query_s += answer.query_s
        totals.decode_s += answer.decode_s
        return {
            "answer": job.text_of(answer.tokens),
            "query_tokens": len(query.ids),
            "new_tokens": len(answer.tokens),
            "query_s": answer.query_s,
            "decode_s": answer.decode_s,
        }

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.job.device)

    def _metrics(self, counts: dict[str, Any], failed: int, seconds: float) -> dict[str, Any]:
        totals = self.totals
        prefill_s = max(gather_numbers(self.job.group, prefill_s=totals.prefill_s)["prefill_s"])
        return {
            "lines": counts["lines"],
            "resumed": counts["resumed"],
            **asdict(totals),
            "failed": failed,
            "hosts": self.job.settings.method.resolved()["hosts"],
            "ranks": self.job.group.world_size,
            "prefill_s": prefill_s,
            "prefill_tokens_per_s": rate(totals.document_tokens, prefill_s),
            "decode_tokens_per_s": rate(totals.new_tokens - totals.answered, totals.decode_s),
            "seconds": seconds,
        }
