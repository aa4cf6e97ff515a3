"""A job with many questions: lines of one file answered into another, one prefill for each document, many at a time."""

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
from apb_ds.tasks.queue import Ended, Question


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
class _Asked:
    """A question that was asked.

    Attributes
    ----------
    prefill_s : of its document, if it was the first about it
    """

    query: _Query
    document_tokens: int
    prefill_s: float
    exact: bool


@dataclass
class _Totals:
    """What this rank has done so far, by the names in the record. Seconds of forwards count once."""

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
        self.sequences = task.sequences
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
        self._answer_asked()
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
            context = self._prefill_document(document, document_ids)
        except JobError as error:
            indices = [query.index for query in document.queries]
            steps.from_first(functools.partial(self._append_failures, indices, str(error)))
        else:
            self._ask_all(document, context)

    def _prefill_document(self, document: _DocumentQueries, document_ids: Tensor) -> Context:
        job = self.job
        first = document.queries[0]
        query_ids = self._tensor(first.embedded) if document.embeds_query else None
        num_query = 0 if query_ids is None else query_ids.shape[1]
        job.steps.together(lambda: job.set_up(document.query_position, document.num_tokens, num_query))
        num_bytes = self.lines[first.index].document_bytes if job.is_first else 0

        def prefill() -> Context | None:
            report = self._prefill_report(num_bytes)
            max_positions = document.max_positions
            return self._queue.prefill(document_ids, query_ids, max_positions=max_positions, progress=report)

        context = self._prefill(job.plan(document.num_tokens, num_query), prefill)
        self._prefilled(document.num_tokens, num_bytes)
        self.totals.prefills += 1
        self.totals.document_tokens += document.num_tokens
        self.totals.prefill_s += context.prefill_s
        self.totals.exact_prefills += int(context.plan.exact)
        return context

    def _ask_all(self, document: _DocumentQueries, context: Context) -> None:
        arguments = self.job.generate_arguments(self.task.generate_arguments())
        for position, query in enumerate(document.queries):
            prefill_s = context.prefill_s if position == 0 else 0.0
            self._ask(
                Question(
                    self._tensor(query.ids),
                    context,
                    max_new_tokens=query.max_new_tokens,
                    seed=self.job.seed_of(query.id),
                    arguments=arguments,
                    tag=_Asked(query, document.num_tokens, prefill_s, context.plan.exact),
                )
            )

    def _take(self, ended: Ended) -> None:
        result = self._result_of(functools.partial(self._answered, ended), local=True)
        self.job.steps.from_first(functools.partial(self._append, ended.question.tag.query.index, result))

    def _answered(self, ended: Ended) -> dict[str, Any]:
        if ended.error is not None:
            raise ended.error
        asked: _Asked = ended.question.tag
        num_query, num_new = len(asked.query.ids), len(ended.tokens)
        self.totals.answered += 1
        self.totals.query_tokens += num_query
        self.totals.new_tokens += num_new
        return {
            "answer": self.job.text_of(ended.tokens),
            "query_tokens": num_query,
            "new_tokens": num_new,
            "query_s": round(ended.query_s, 4),
            "decode_s": round(ended.decode_s, 4),
            "document_tokens": asked.document_tokens,
            "prefill_s": round(asked.prefill_s, 4),
            "exact": asked.exact,
            "seconds": round(ended.query_s + ended.decode_s + asked.prefill_s, 4),
        }

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.job.device)

    def _metrics(self, counts: dict[str, Any], failed: int, seconds: float) -> dict[str, Any]:
        totals = self.totals
        if self._opened is not None:
            totals.query_s, totals.decode_s = self._opened.stats.query_s, self._opened.stats.decode_s
        prefill_s = max(gather_numbers(self.job.group, prefill_s=totals.prefill_s)["prefill_s"])
        return {
            "lines": counts["lines"],
            "resumed": counts["resumed"],
            **asdict(totals),
            "failed": failed,
            "hosts": self.job.settings.method.resolved()["hosts"],
            "ranks": self.job.num_sharing,
            "prefill_s": prefill_s,
            "prefill_tokens_per_s": rate(totals.document_tokens, prefill_s),
            "decode_tokens_per_s": rate(totals.new_tokens - totals.answered, totals.decode_s),
            "seconds": seconds,
        }
