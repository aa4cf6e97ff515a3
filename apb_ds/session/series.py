"""What jobs with many questions share: results in a file, resumed after an interruption, and a progress bar."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apb_ds.engine.context import Context
from apb_ds.plan import Plan
from apb_ds.report.answers import AnswerFile
from apb_ds.report.progress import BatchProgress, batch_progress
from apb_ds.session.active_job import ActiveJob
from apb_ds.session.model_in_use import free_memory
from apb_ds.session.steps import JobError
from apb_ds.tasks.queue import AnswerQueue, Ended, Question

logger = logging.getLogger(__name__)


class QuestionSeries:
    """A job with many questions: those answered before are skipped, and one that fails does not stop the others.

    Questions are answered together, up to `sequences` of them, and written as their answers end.

    Attributes
    ----------
    sequences : questions that are answered at a time
    answers : the output, open on the first rank only
    progress : the bar, on the first rank; None on the others
    """

    unit = "lines"
    section = "task"  # of the config, with output and overwrite
    sequences: int
    answers: AnswerFile
    progress: BatchProgress | None = None

    def __init__(self, job: ActiveJob) -> None:
        self.job = job
        self._stack = contextlib.ExitStack()
        self._opened: AnswerQueue | None = None

    def serve(self) -> dict[str, Any]:
        """Answer what is not answered yet; return the job's parts of the record, the same on every rank."""
        with self._stack:
            return self._serve()

    def _serve(self) -> dict[str, Any]:
        raise NotImplementedError

    def _open_answers(self, path: Path, keys: Sequence[tuple[str | int, str]], *, overwrite: bool) -> list[int]:
        """Open the output; return the indices of the questions without an answer.

        Parameters
        ----------
        keys : each question's id, and a hash of what is asked
        """
        answers = AnswerFile(path, keys, self.job.answer_settings(), overwrite=overwrite, section=self.section)
        self.answers = self._stack.enter_context(answers)
        if answers.kept:
            logger.info("%d of %d %s were answered before in %s.", len(answers.kept), len(keys), self.unit, path)
        if answers.changed:
            logger.warning("%d %s have changed since; answering them again.", len(answers.changed), self.unit)
        return [index for index in range(len(keys)) if index not in answers.kept]

    def _show_progress(self, num_questions: int, work: int) -> None:
        """Show a bar; `work` is the sum over the documents of what `_prefill_report` is given for each."""
        self.progress = self._stack.enter_context(
            batch_progress(self.job.error_console, num_questions, work, self.unit)
        )

    def _prefill_report(self, work: int) -> Callable[[int, int], None] | None:
        """Return the callback for a prefill's progress."""
        return None if self.progress is None else self.progress.prefill(work)

    def _prefilled(self, num_tokens: int, work: int) -> None:
        """Count a prefill."""
        if self.progress is not None:
            self.progress.prefilled(num_tokens, work)

    def _result_of(self, work: Callable[[], dict[str, Any]], *, local: bool = False) -> dict[str, Any]:
        """Do the work on all ranks together, see `Steps.together`; a failure becomes the result."""
        try:
            return self.job.steps.together(work, local=local)
        except JobError as error:
            return {"error": str(error)}

    # --- questions that are answered together ------------------------------------------------------------------------

    def _take(self, ended: Ended) -> None:
        """Write the result of a question that was asked, on all ranks together."""
        raise NotImplementedError

    @property
    def _queue(self) -> AnswerQueue:
        """The questions that are being answered; only once the job has an engine."""
        if self._opened is None:
            queue = AnswerQueue(self.job.engine, self.sequences, f"{self.section}.sequences")
            self._opened = self._stack.enter_context(queue)
        return self._opened

    def _prefill(self, plan: Plan, prefill: Callable[[], Context | None]) -> Context:
        """Prefill a document with `AnswerQueue.prefill` when there is room for it.

        Raises
        ------
        JobError
            On every rank.
        """
        while not self._queue.has_room(plan):
            self._go_on()
        context = self.job.steps.together(prefill)
        if context is None:
            logger.warning("memory ran out next to other documents; their questions are answered first.")
            self._answer_asked()
            free_memory()
            context = self.job.steps.together(prefill)
        assert context is not None, "nothing else is in memory"
        return context

    def _ask(self, question: Question) -> None:
        """Ask a question, and answer some if enough are there."""
        self._queue.ask(question)
        while self._queue.is_full:
            self._go_on()

    def _answer_asked(self) -> None:
        """Answer all questions that were asked."""
        while self._opened is not None and len(self._opened):
            self._go_on()

    def _go_on(self) -> None:
        for ended in self._queue.step():
            self._take(ended)

    def _write(self, index: int, result: dict[str, Any]) -> None:
        """Write a question's result and advance the bar, on the first rank."""
        self.answers.append(index, result)
        if self.progress is not None:
            self.progress.line_done(failed="error" in result)
