"""A conversation: the document once, then questions from the first rank's standard input, line by line."""

from __future__ import annotations

import functools
import io
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from torch import Tensor

from apb_ds.engine.context import Context
from apb_ds.report.progress import prefill_progress
from apb_ds.report.record import rate
from apb_ds.session.active_job import ActiveJob, Answer
from apb_ds.session.metrics import plan_metrics
from apb_ds.session.steps import JobError, Steps
from apb_ds.session.stop_request import StopRequest
from apb_ds.tasks import ChatConfig
from apb_ds.tasks.base import needs_tokenizer
from apb_ds.tasks.prompts import EncodedDocument, encode_document, encode_embedded, encode_next_turn, encode_query
from apb_ds.tasks.text import clean, read_text

PROMPT = "> "
# While the user types, the other ranks wait in a collective, which must end before its timeout.
WAITS_PER_TIMEOUT = 4
MAX_WAIT_S = 30.0
FIRST_WAIT_S = 0.2  # for the first line of a pipe; an empty one ends at once


class Conversation:
    """Questions about one document, each asked after the answers before it.

    Attributes
    ----------
    turns : questions and answers so far, as the record has them
    document : on the first rank, once it is encoded
    """

    document: EncodedDocument

    def __init__(self, job: ActiveJob, task: ChatConfig) -> None:
        self.job = job
        self.task = task
        self.turns: list[dict[str, Any]] = []
        self.last_id: int | None = None  # the last token of the latest answer
        self.lines = QuestionLines(job.steps, job.stdin, job.settings.timeout_s)

    def hold(self) -> dict[str, Any]:
        """Hold the conversation; return its parts of the record, the same on every rank."""
        job = self.job
        first, embedded, num_document, position = job.steps.from_first(self._encode)
        num_query = len(embedded)
        ids = torch.tensor([[*self.document.ids, *embedded]]) if job.is_first else None
        ids = job.steps.ids_from_first(ids, num_document + num_query, job.device)
        document_ids, query_ids = ids[:, :num_document], ids[:, num_document:] if num_query else None
        method = job.steps.together(lambda: job.set_up(position, num_document, num_query))
        usage = job.track_usage()
        context = job.steps.together(lambda: self._prefill(document_ids, query_ids))
        job.seed_everything()
        task = {"name": self.task.name, "turns": self.turns, "query_position": position, "correct": None}
        job.so_far["task"] = task
        for question, turn_ids in self._questions(first):
            self._turn(context, question, turn_ids)
        parts = {
            "task": task,
            "metrics": plan_metrics(context, job.group) | usage.metrics() | self._turn_metrics(),
            "exact": context.plan.exact,
            "method": method.resolved(),
        }
        failed = [turn["error"] for turn in self.turns if turn["answer"] is None]
        if failed:
            parts |= {"status": "failed", "error": f"{len(failed)} of {len(self.turns)} turns failed: {failed[0]}"}
        return parts

    def _encode(self) -> tuple[tuple[str, list[int]] | None, list[int], int, int]:
        """Encode the document. Return the first question with its ids, if given, the ids that the anchor embeds, and
        the document's length and query position."""
        tokenizer = needs_tokenizer(self.job.chat_tokenizer, self.task.name)
        text = read_text("task.document", self.task.document)
        if self.task.query is None:
            self.lines.check()
        self.document = encode_document(tokenizer, text, allow_special=self.task.allow_special_tokens)
        first, embedded = None, []
        if self.task.query is not None:
            question = read_text("task.query", self.task.query).strip()
            first = question, encode_query(tokenizer, self.document, question)
            embedded = encode_embedded(tokenizer, self.document, question)
        return first, embedded, len(self.document.ids), self.document.query_position

    def _prefill(self, document_ids: Tensor, query_ids: Tensor | None) -> Context:
        job = self.job
        if query_ids is None and job.engine.attention.needs_query:
            raise ValueError(
                f"method.compressor={job.engine.apb_config.compressor} scores with the query; give the first question "
                "as task.query, or use another compressor."
            )
        num_positions = document_ids.shape[1] + self.task.turn_tokens
        num_positions = max(min(num_positions, job.max_positions or num_positions), document_ids.shape[1])
        with prefill_progress(job.error_console, shown=job.is_first) as progress:
            return job.engine.prefill(document_ids, query_ids, max_positions=num_positions, progress=progress)

    def _questions(self, first: tuple[str, list[int]] | None) -> Iterator[tuple[str, list[int] | None]]:
        """Yield each question, and the first one's ids, on every rank."""
        if first is not None:
            yield first
        while (question := self.lines.next()) is not None:
            yield question, None

    def _ids_of(self, question: str) -> list[int]:
        problem = clean(question)[1]
        if problem:
            raise ValueError(f"the question {problem}.")
        if self.last_id is None:
            return encode_query(self.job.chat_tokenizer, self.document, question)
        allow_special = self.task.allow_special_tokens
        return encode_next_turn(self.job.chat_tokenizer, question, self.last_id, allow_special=allow_special)

    def _turn(self, context: Context, question: str, ids: list[int] | None) -> None:
        job = self.job
        shown = question.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if job.is_first and not job.stdin.isatty():
            print(f"{PROMPT}{shown}", flush=True)  # on a terminal the user sees what they type
        stop = StopRequest()
        try:
            ids = ids or job.steps.from_first(functools.partial(self._ids_of, question))
            answer = job.steps.together(functools.partial(self._answer, context, ids, stop))
        except JobError as error:  # the conversation is unchanged
            self.turns.append({"question": shown, "answer": None, "error": str(error)})
            if job.is_first:
                print(f"Error: {error}", file=sys.stderr, flush=True)
            return
        self.last_id = answer.tokens[-1]
        text = job.text_of(answer.tokens)
        if job.is_first and not self.task.stream:
            print(text, flush=True)
        self.turns.append(
            {
                "question": shown,
                "answer": text,
                "stopped": job.steps.from_first(lambda: stop.is_made),
                "query_tokens": len(ids),
                "new_tokens": len(answer.tokens),
                "query_s": answer.query_s,
                "decode_s": answer.decode_s,
            }
        )

    def _answer(self, context: Context, ids: list[int], stop: StopRequest) -> Answer:
        options: dict[str, Any] = {"streamer": self.job.streamer()} if self.task.stream else {}
        query_ids = torch.tensor([ids], device=self.job.device)
        arguments = {**self.task.generate_arguments(), "stopping_criteria": [stop]}
        with stop.by_interrupt():
            return self.job.answer(context, query_ids, self.task.max_new_tokens, arguments, append=True, **options)

    def _turn_metrics(self) -> dict[str, Any]:
        answered = [turn for turn in self.turns if turn["answer"] is not None]
        total = {
            name: sum(turn[name] for turn in answered) for name in ("query_tokens", "new_tokens", "query_s", "decode_s")
        }
        speed = rate(total["new_tokens"] - len(answered), total["decode_s"])
        return {**total, "turns": len(self.turns), "decode_tokens_per_s": speed}


class QuestionLines:
    """Lines from the first rank's standard input, sent to all ranks; blank ones are skipped.

    A thread reads the stream, so that the first rank can tell the others from time to time to keep waiting. Bytes that
    cannot be decoded become surrogates, which `clean` finds: one such line must not end the conversation.
    """

    def __init__(self, steps: Steps, stream: TextIO, timeout_s: float) -> None:
        self.steps = steps
        self.stream = stream
        self.wait_s = min(timeout_s / WAITS_PER_TIMEOUT, MAX_WAIT_S)
        self._lines: queue.Queue[tuple[str, str]] = queue.Queue()
        self._ahead: tuple[str, str] | None = None  # read by `check`
        self._thread: threading.Thread | None = None  # started by the first look at the stream

    def check(self) -> None:
        """Raise ValueError if it is certain that there is no question. For the first rank, before its long work."""
        if self.stream.isatty():
            return
        kind, text = self._wait(FIRST_WAIT_S)
        if kind == "waiting":
            return
        if kind == "end":
            raise ValueError(
                "there is no question: standard input is empty. Pipe questions into it, one a line, or give task.query."
            )
        if kind == "failed":
            raise ValueError(text)
        self._ahead = kind, text

    def next(self) -> str | None:
        """Return the next line on every rank, None at the end.

        Raises
        ------
        JobError
            On every rank, if the stream cannot be read.
        """
        kind, text = "line", ""
        while kind == "waiting" or (kind == "line" and not text):
            if kind == "line" and self.steps.group.is_first and self.stream.isatty():
                print(PROMPT, end="", flush=True)
            kind, text = self.steps.from_first(self._next)
        if kind == "failed":
            raise JobError(text)
        return text if kind == "line" else None

    def _next(self) -> tuple[str, str]:
        ahead, self._ahead = self._ahead, None
        return ahead or self._wait(self.wait_s)

    def _wait(self, seconds: float) -> tuple[str, str]:
        if self._thread is None:
            if isinstance(self.stream, io.TextIOWrapper) and self.stream.errors != "surrogateescape":
                self.stream.reconfigure(errors="surrogateescape")
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return "waiting", ""

    def _read(self) -> None:
        try:
            for line in self.stream:
                question = clean(line)[0].strip()
                if question or self.stream.isatty():  # who presses Enter sees the prompt again
                    self._lines.put(("line", question))
        except (OSError, ValueError) as error:
            self._lines.put(("failed", f"standard input cannot be read: {error}"))
            return
        self._lines.put(("end", ""))
