"""A session: the jobs of a command, one or a sweep, in step on all ranks, over one group and one model."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from typing import Any, TextIO

import torch
from rich.console import Console

from apb_ds.loading import ModelConfig
from apb_ds.parallel.consistency import describe_software, shared_validation
from apb_ds.parallel.failure.ending import Watch
from apb_ds.parallel.groups import SequenceGroup, world_group
from apb_ds.parallel.launcher import launched_rank
from apb_ds.parallel.pipeline import Pipeline
from apb_ds.report.compare import compare_records
from apb_ds.report.memory import peak_memory_kind
from apb_ds.report.paths import hide_paths
from apb_ds.report.record import RECORD_NAME, environment, write_json
from apb_ds.report.results import flatten
from apb_ds.report.table import job_table, make_console, sweep_table, title
from apb_ds.session.active_job import ActiveJob
from apb_ds.session.batch import Batch
from apb_ds.session.chat import Conversation
from apb_ds.session.evaluation import Evaluation
from apb_ds.session.harness import HarnessEvaluation
from apb_ds.session.job import Job, Settings, read_settings
from apb_ds.session.model_in_use import ModelInUse, free_memory
from apb_ds.session.question import serve_question
from apb_ds.session.steps import JOB_ERRORS, JobError, Steps
from apb_ds.tasks import BatchConfig, ChatConfig, LmEvalConfig
from apb_ds.utils.text import first_line


class Session:
    """Runs jobs one after the other. All ranks run the same jobs in the same order.

    The first job joins the group; a model is loaded again only if its config changes.

    Parameters
    ----------
    group : SequenceGroup, optional
        An existing group. Default: all ranks that the launcher started.
    console, error_console : rich Console, optional
        Where the first rank prints. Default: standard output and standard error.
    stdin : text stream, optional
        Where the questions of a conversation come from. Default: standard input.
    watch : Watch, optional
        The process's, which follows the group.

    Attributes
    ----------
    records : those of the jobs so far
    comparisons : those of a sweep's evaluations, once it is closed
    """

    def __init__(
        self,
        group: SequenceGroup | None = None,
        console: Console | None = None,
        error_console: Console | None = None,
        stdin: TextIO | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.group = group
        self._watch = watch
        self.console = console or make_console()
        self.error_console = error_console or make_console(to_stderr=True)
        self.stdin = stdin or sys.stdin or io.StringIO()  # None if it is closed
        self.records: list[dict[str, Any]] = []
        self.comparisons: list[dict[str, Any]] = []
        self._owns_group = group is None
        self._job: Job | None = None  # the running one
        self._so_far: dict[str, Any] = {}  # of its record
        self._other_failed = False
        self._loaded: ModelInUse | None = None

    @property
    def is_first(self) -> bool:
        return self.group.is_first if self.group is not None else launched_rank() == 0

    @property
    def has_failed(self) -> bool:
        """Whether any job failed; after `close`, on any rank."""
        return self._other_failed or any(record["status"] != "ok" for record in self.records)

    def run(self, job: Job) -> dict[str, Any]:
        """Run one job; print its answer and table, and write its record, on the first rank.

        Returns
        -------
        dict
            The record, the same on every rank except for the queries' times; ``status`` is ``ok`` or ``failed``, and
            ``error`` says why.
        """
        self._job, self._so_far = job, {}
        record = _new_record(job)
        try:
            record |= {"status": "ok"} | self._serve(job, *self._agreed_settings(job))
        except JobError as error:
            record |= self._so_far | {"error": str(error)}
        self._keep(job, record)
        self._job = None
        return record

    def fail(self, job: Job, why: str) -> dict[str, Any]:
        """Record a job that cannot run at all. All ranks call this together."""
        record = _new_record(job) | {"error": why}
        self._keep(job, record)
        return record

    def close(self) -> None:
        """Print a sweep's table, then leave the group. All ranks call this together."""
        self._print_sweep(compare=True)
        self._drop_model()
        if self._owns_group and self.group is not None and torch.distributed.is_initialized():
            # Waits for all ranks: a launcher ends the others as soon as one exits with an error.
            self._other_failed = any(self.group.gather_objects(self.has_failed))
            torch.distributed.destroy_process_group()
        self.group = None

    def abandon(self, why: str) -> None:
        """Record that the running job failed, and print a sweep's table, on the first rank only.

        Sends nothing: for a rank that ends before its jobs do.
        """
        if not self.is_first:
            return
        if self._job is not None:
            record = _new_record(self._job) | self._so_far | {"error": why}
            self.records.append(record)
            if self._job.run_dir is not None:
                write_json(self._job.run_dir / RECORD_NAME, hide_paths(record, self._job.run_dir))
        self._print_sweep()

    def _print_sweep(self, *, compare: bool = False) -> None:
        if self.is_first and len(self.records) > 1:
            self.console.print(sweep_table(self.records))
            if compare:
                self.comparisons = compare_records(self.records, self.console)

    def _agreed_settings(self, job: Job) -> tuple[Settings, SequenceGroup]:
        """Return the job's settings, valid and equal on all ranks, and the group, joined if this is the first job.

        Raises
        ------
        JobError
            On every rank; before the ranks have joined their group, on each that finds the settings bad.
        """
        if self.group is None:
            try:
                timeout_s = self._read(job).timeout_s
            except ValueError as error:  # usually the same on every rank, so that no rank waits for another
                if launched_rank() > 0 and os.environ.get("LOCAL_RANK") == "0":  # another node, another command line
                    print(f"Error: rank {launched_rank()}: {error}", file=sys.stderr, flush=True)
                raise JobError(str(error)) from error
            self.group = self._join(timeout_s)
        try:
            with shared_validation(self.group, "a job") as comparison:
                settings = self._read(job)
                comparison.facts = {**_shared_values(job), **describe_software()}
        except ValueError as error:
            raise JobError(str(error)) from error
        return settings, self.group

    def _read(self, job: Job) -> Settings:
        """Return the job's settings; ValueError if they are bad in any way."""
        try:
            return read_settings(job.values)
        except JOB_ERRORS as error:
            if job.debug and self.is_first:
                traceback.print_exc()
            raise ValueError(str(error)) from error

    def _join(self, timeout_s: float) -> SequenceGroup:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # deepspeed prints what it has compiled
                return world_group(timeout_s, self._watch)
        except RuntimeError as error:  # each rank notices this by itself
            raise JobError(
                f"the ranks could not join their group: {first_line(error)}. Is the port in use? Give the launcher "
                "another --master_port."
            ) from error

    def _serve(self, job: Job, settings: Settings, group: SequenceGroup) -> dict[str, Any]:
        group.set_timeout(settings.timeout_s)  # jobs of a sweep may differ
        steps = Steps(group, debug=job.debug)
        steps.from_first(settings.task.check_sources)
        pipeline = Pipeline.of(group, settings.stages) if settings.stages > 1 else None
        holders = (group if pipeline is None else pipeline.ranks).part(settings.shard_ranks)
        model = steps.together(lambda: self._model_for(settings.model, holders, pipeline), local=True)
        steps.together(lambda: model.load_heads(settings), local=True)
        loaded = model.loaded
        active = ActiveJob(job, settings, steps, model, self.error_console, self.stdin)
        self._so_far = active.so_far
        parts = _serve_task(active)
        method = parts.pop("method")
        return {
            **parts,
            "model": {
                "source": loaded.source,
                "load_s": loaded.load_s,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "shard_weights": loaded.shard_weights,
                "config": asdict(settings.model),
            },
            "settings": {"method": method, "seed": settings.seed, "memory": peak_memory_kind(loaded.device)},
            "kernels": {} if active.engine is None else active.engine.kernel_names,
            "seed": settings.seed,
            **environment(loaded.device),
        }

    def _model_for(self, config: ModelConfig, holders: SequenceGroup, pipeline: Pipeline | None) -> ModelInUse:
        loaded = self._loaded
        if loaded is None or (loaded.config, loaded.pipeline) != (config, pipeline) or loaded.group is not holders:
            keeps_weights = loaded is not None and loaded.pipeline is pipeline is None
            changed = loaded.with_config(config, holders) if loaded is not None and keeps_weights else None
            self._drop_model()
            self._loaded = loaded = changed or ModelInUse(config, group=holders, pipeline=pipeline)
        return loaded

    def _drop_model(self) -> None:
        if self._loaded is not None:
            self._loaded = None
            free_memory()

    def _keep(self, job: Job, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.is_first:
            _report(job, record, self.console)


def _serve_task(job: ActiveJob) -> dict[str, Any]:
    """Answer what the task asks; return its parts of the record."""
    task, evaluation = job.settings.task, job.settings.evaluation
    if evaluation is not None:
        kind = HarnessEvaluation if isinstance(task, LmEvalConfig) else Evaluation
        return kind(job, task, evaluation).serve()
    if isinstance(task, BatchConfig):
        return Batch(job, task).serve()
    if isinstance(task, ChatConfig):
        return Conversation(job, task).hold()
    return serve_question(job)


# Values that only the first rank uses: its outputs may have the time of day in their names.
_FIRST_RANKS_VALUES = ("task.output", "eval.output", "debug")


def _shared_values(job: Job) -> dict[str, Any]:
    """Return the values of a job that must be equal on all ranks, by config path."""
    return {name: value for name, value in flatten(job.values).items() if name not in _FIRST_RANKS_VALUES}


def _new_record(job: Job) -> dict[str, Any]:
    return {
        "status": "failed",
        "error": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "overrides": job.overrides,
        "config": job.values,
    }


def _report(job: Job, record: dict[str, Any], console: Console) -> None:
    """Write the record, and print its main results. If it cannot be written, the job fails."""
    if job.run_dir is not None:
        try:
            write_json(job.run_dir / RECORD_NAME, hide_paths(record, job.run_dir))
        except OSError as error:
            path = job.run_dir / RECORD_NAME
            why = (
                f"{path} cannot be written ({error.strerror or error}); make room, or set hydra.run.dir "
                "(hydra.sweep.dir with -m) to a folder on another disk."
            )
            record |= {"status": "failed", "error": why if record["error"] is None else f"{record['error']} And {why}"}
            job = replace(job, run_dir=None)
    if job.in_sweep:
        return  # launch/infer.py prints one line for each job
    if "metrics" in record:
        # print, not the console: the answer must reach a pipe unwrapped and unstyled.
        for line in _answer_lines(record["task"]):
            print(line, flush=True)
        print(f"Ran {title(record)}")
        console.print(job_table(record))
        if job.run_dir is not None:
            print(f"Record: {job.run_dir / RECORD_NAME}", flush=True)
    if record["status"] != "ok":
        print(f"Error: {record['error']}", file=sys.stderr, flush=True)


def _answer_lines(task: dict[str, Any]) -> list[str]:
    if "directory" in task:
        return [f"Results: {task['directory']}"]
    if "output" in task:
        return [f"Answers: {task['output']}"]
    if "turns" in task or task["streamed"]:
        return []  # printed already
    truth = task["ground_truth"]
    if truth is None and not task["random_ids"]:
        return [f"Answer: {task['prediction']}"]
    return [
        f"Ground Truth: {truth if truth is not None else 'none (random token ids)'}",
        f"Prediction: {task['prediction']}",
    ]
