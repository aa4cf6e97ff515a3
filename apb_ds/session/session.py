"""A session: the jobs of a run or a sweep, in step on all ranks, over one group and one model."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console

from apb_ds.config import APBConfig
from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.parallel.groups import SequenceGroup, launched_rank, world_group
from apb_ds.plan import Plan, plan_request
from apb_ds.report.memory import peak_memory_bytes, peak_memory_kind, reset_peak_memory
from apb_ds.report.progress import prefill_progress
from apb_ds.report.record import RECORD_NAME, environment, rate, write_json
from apb_ds.report.table import job_table, make_console, sweep_table, title
from apb_ds.session.job import Job, Settings, read_settings
from apb_ds.tasks import Sample

# What a job may fail with while the sweep goes on. Anything else is a bug, and ends the process.
JOB_ERRORS = (ValueError, RuntimeError, OSError)

Result = TypeVar("Result")


class JobError(Exception):
    """A job failed on at least one rank, and every rank knows."""


@dataclass
class Answer:
    """What one request gave on this rank."""

    plan: Plan
    tokens: list[int]
    prefill_s: float
    query_s: float
    decode_s: float
    bytes_sent: int
    peak_memory_bytes: int


class Session:
    """Runs jobs one after the other. All ranks run the same jobs in the same order.

    The group is joined at the first job that needs it; a model is loaded again only where its config changes.

    Parameters
    ----------
    group : SequenceGroup, optional
        A group made before; by default all ranks that the launcher started.
    console, error_console : rich Console, optional
        Where the first rank prints; by default standard output and standard error.

    Attributes
    ----------
    records : of the jobs so far
    """

    def __init__(
        self,
        group: SequenceGroup | None = None,
        console: Console | None = None,
        error_console: Console | None = None,
    ) -> None:
        self.group = group
        self.console = console or make_console()
        self.error_console = error_console or make_console(to_stderr=True)
        self.records: list[dict[str, Any]] = []
        self._owns_group = group is None
        self._loaded: tuple[ModelConfig, LoadedModel] | None = None
        self._engine: Any = None

    @property
    def is_first(self) -> bool:
        return self.group.is_first if self.group is not None else launched_rank() == 0

    @property
    def has_failed(self) -> bool:
        """Whether any job did."""
        return any(record["status"] != "ok" for record in self.records)

    def run(self, job: Job) -> dict[str, Any]:
        """Run one job; print its answer and table, and write its record, on the first rank.

        Returns
        -------
        dict
            The record, the same on every rank; ``status`` is ``ok`` or ``failed``, with ``error`` saying why.
        """
        record: dict[str, Any] = {
            "status": "failed",
            "error": None,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "overrides": job.overrides,
            "config": job.values,
        }
        try:
            # The same on every rank, and before the ranks meet: nobody waits for one that has failed.
            settings = read_settings(job.values)
        except JOB_ERRORS as error:
            self._say_trace(job)
            record["error"] = str(error)
        else:
            try:
                record |= self._serve(job, settings)
                record["status"] = "ok"
            except JobError as error:
                record["error"] = str(error)
        self.records.append(record)
        if self.is_first:
            self._report(job, record)
        return record

    def close(self) -> None:
        """Print what closes a sweep, then leave the group, all ranks together."""
        if self.is_first and len(self.records) > 1:
            self.console.print(sweep_table(self.records))
        self._drop_model()
        if self._owns_group and self.group is not None and torch.distributed.is_initialized():
            self.group.barrier()  # a launcher ends the other ranks as soon as one exits with an error
            torch.distributed.destroy_process_group()
        self.group = None

    def _serve(self, job: Job, settings: Settings) -> dict[str, Any]:
        if self.group is None:
            with contextlib.redirect_stdout(io.StringIO()):  # deepspeed tells here what it has compiled
                self.group = world_group(settings.timeout_s)
        group = self.group
        loaded = self._in_step(job, lambda: self._model(settings.model))
        sample, method = self._in_step(job, lambda: self._prepare(settings, loaded))
        reset_peak_memory(loaded.device)
        answer = self._in_step(job, lambda: self._request(sample, loaded))
        everyone = group.gather_objects(
            {"prefill_s": answer.prefill_s, "bytes_sent": answer.bytes_sent, "peak": answer.peak_memory_bytes}
        )
        return {
            "task": _task_part(settings, sample, answer, loaded.tokenizer),
            "metrics": _metrics_part(sample, answer, everyone),
            "model": {
                "source": loaded.source,
                "load_s": loaded.load_s,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "config": asdict(settings.model),
            },
            "settings": {"method": asdict(method), "seed": settings.seed, "memory": peak_memory_kind(loaded.device)},
            "kernels": self._engine.kernel_names,
            "exact": answer.plan.exact,
            "seed": settings.seed,
            **environment(loaded.device),
        }

    def _model(self, config: ModelConfig) -> LoadedModel:
        if self._loaded is None or self._loaded[0] != config:
            self._drop_model()
            self._loaded = config, load_model(config)
        return self._loaded[1]

    def _prepare(self, settings: Settings, loaded: LoadedModel) -> tuple[Sample, APBConfig]:
        """Make the sample, check that its lengths fit the settings, and have the engine ready for them."""
        from apb_ds.entry import init_inference  # brings deepspeed along

        assert self.group is not None
        vocabulary = loaded.model.get_input_embeddings().num_embeddings
        sample = next(settings.task.samples(loaded.tokenizer, vocabulary, settings.seed))
        method = settings.method_for(sample.query_position)
        plan_request(method, sample.document_ids.shape[1], sample.query_ids.shape[1], self.group.world_size)
        if self._engine is None:
            self._engine = init_inference(loaded.model, method, group=self.group, timeout_s=settings.timeout_s)
        else:
            self._engine.configure(method)
        return sample, method

    def _request(self, sample: Sample, loaded: LoadedModel) -> Answer:
        assert self.group is not None
        sent_before = self.group.bytes_sent
        num_positions = sample.document_ids.shape[1] + sample.query_ids.shape[1] + sample.max_new_tokens
        with prefill_progress(self.error_console, shown=self.is_first) as progress:
            context = self._engine.prefill(
                sample.document_ids, sample.query_ids, max_positions=num_positions, progress=progress
            )
        stops: dict[str, Any] = {}
        if sample.stop_strings:
            stops = {"stop_strings": list(sample.stop_strings), "tokenizer": loaded.tokenizer}
        tokens = self._engine.generate(
            query_ids=sample.query_ids,
            context=context,
            max_new_tokens=sample.max_new_tokens,
            do_sample=False,
            **stops,
        )
        stats = self._engine.stats
        return Answer(
            plan=context.plan,
            tokens=tokens[0].tolist(),
            prefill_s=context.prefill_s,
            query_s=stats.query_s,
            decode_s=stats.decode_s,
            bytes_sent=self.group.bytes_sent - sent_before,
            peak_memory_bytes=peak_memory_bytes(loaded.device),
        )

    def _in_step(self, job: Job, work: Callable[[], Result]) -> Result:
        """Do the work, then have all ranks agree on whether it went well: one rank's failure is everybody's.

        Bad input (ValueError) is found before anything is sent. Whatever else fails on one of several ranks may leave
        the others inside a collective: then this rank ends, and the launcher ends the others.
        """
        assert self.group is not None
        result: Result | None = None
        failure: str | None = None
        try:
            result = work()
        except JOB_ERRORS as error:
            if not isinstance(error, ValueError) and self.group.world_size > 1:
                raise
            self._say_trace(job)
            failure = str(error) or type(error).__name__
        failures = self.group.gather_objects(failure)
        if any(failures):
            raise JobError(_first_failure(failures))
        return result  # type: ignore[return-value]

    def _drop_model(self) -> None:
        self._engine = self._loaded = None
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _say_trace(self, job: Job) -> None:
        if job.debug and self.is_first:
            traceback.print_exc()

    def _report(self, job: Job, record: dict[str, Any]) -> None:
        if job.run_dir is not None:
            write_json(job.run_dir / RECORD_NAME, record)
        if record["status"] != "ok":
            print(f"Error: {record['error']}", file=sys.stderr, flush=True)
            return
        task = record["task"]
        # Plain prints: the answer must reach a pipe as it is, unwrapped and unstyled.
        truth = task["ground_truth"]
        print(f"Ground Truth: {truth if truth is not None else 'none (random token ids)'}", flush=True)
        print(f"Prediction: {task['prediction']}", flush=True)
        print(f"Ran {title(record)}")
        self.console.print(job_table(record))
        if job.run_dir is not None:
            print(f"Record: {job.run_dir / RECORD_NAME}", flush=True)


def _first_failure(failures: list[str | None]) -> str:
    """Return what to tell: the first rank's failure as it is, another's with the rank's number."""
    rank, failure = next((rank, failure) for rank, failure in enumerate(failures) if failure)
    return failure if rank == 0 else f"rank {rank}: {failure}"


def _task_part(settings: Settings, sample: Sample, answer: Answer, tokenizer: Any | None) -> dict[str, Any]:
    truth = sample.ground_truth
    if tokenizer is None:
        prediction = " ".join(map(str, answer.tokens))
    else:
        prediction = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    return {
        "name": settings.task.name,
        "ground_truth": truth,
        "prediction": prediction,
        "correct": None if truth is None else truth in prediction,
        "random_ids": sample.random_ids,
        "query_position": sample.query_position,
    }


def _metrics_part(sample: Sample, answer: Answer, everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a request: times of the slowest rank, bytes and memory of each."""
    plan = answer.plan
    num_tokens = sample.document_ids.shape[1]
    new_tokens = len(answer.tokens)
    prefill_s = max(rank["prefill_s"] for rank in everyone)
    return {
        "document_tokens": num_tokens,
        "query_tokens": sample.query_ids.shape[1],
        "hosts": plan.hosts,
        "ranks": plan.world_size,
        "rounds": len(plan.rounds),
        "block_length": max(plan.block_length(host) for host in range(plan.hosts)),
        "anchor_length": plan.anchor_length,
        "passing_length": plan.passing_length,
        "kept_lengths": list(plan.kept_lengths),
        "exact": plan.exact,
        "prefill_s": prefill_s,
        "prefill_s_per_rank": [rank["prefill_s"] for rank in everyone],
        "prefill_tokens_per_s": rate(num_tokens, prefill_s),
        "query_s": answer.query_s,
        "decode_s": answer.decode_s,
        "new_tokens": new_tokens,
        "decode_tokens_per_s": rate(new_tokens - 1, answer.decode_s),  # the first comes with the query
        "bytes_sent": [rank["bytes_sent"] for rank in everyone],
        "peak_memory_bytes": max(rank["peak"] for rank in everyone),
        "peak_memory_bytes_per_rank": [rank["peak"] for rank in everyone],
    }
