"""A job with one question: prefill, answer, and how long both took."""

from __future__ import annotations

from typing import Any

from apb_ds.engine.context import Context
from apb_ds.report.progress import prefill_progress
from apb_ds.report.record import rate
from apb_ds.session.active_job import ActiveJob, Answer
from apb_ds.session.metrics import count_prefill, plan_metrics
from apb_ds.tasks import Sample


def serve_question(job: ActiveJob) -> dict[str, Any]:
    """Answer the task's sample; return its parts of the record, the same on every rank."""
    steps, settings = job.steps, job.settings
    sample = job.sample_from_first(lambda: _only_sample(job))
    method = steps.together(lambda: job.set_up_for(sample))
    usage = job.track_usage()
    streams = bool(getattr(settings.task, "stream", False))
    context, answer = steps.together(lambda: _ask(job, sample, streams))
    new_tokens = len(answer.tokens)
    metrics = {
        **plan_metrics(context, job.group),
        **usage.metrics(),
        "query_tokens": sample.num_query,
        "prefill_flops": count_prefill(job.engine, context, sample.num_query),
        "query_s": answer.query_s,
        "decode_s": answer.decode_s,
        "new_tokens": new_tokens,
        "decode_tokens_per_s": rate(new_tokens - 1, answer.decode_s),  # the query gives the first
    }
    prediction = job.text_of(answer.tokens)
    score = settings.task.score(sample, prediction)
    task = {
        "name": settings.task.name,
        "ground_truth": sample.ground_truth,
        "prediction": prediction,
        "correct": None if score is None else score == 1.0,
        "random_ids": sample.random_ids,
        "query_position": sample.query_position,
        "streamed": streams,
    }
    return {"task": task, "metrics": metrics, "exact": context.plan.exact, "method": method.resolved()}


def _only_sample(job: ActiveJob) -> Sample:
    task = job.settings.task
    samples = iter(task.samples(job.chat_tokenizer, job.vocab_size, job.settings.seed))
    sample = next(samples)
    if next(samples, None) is not None:
        raise ValueError(f"task={task.name} has several samples; launch/eval.py answers and scores them.")
    return sample


def _ask(job: ActiveJob, sample: Sample, streams: bool) -> tuple[Context, Answer]:
    job.seed_everything()
    with prefill_progress(job.error_console, shown=job.is_first) as progress:
        context = job.prefill(sample, progress)
    if streams and job.is_first:
        print("Answer: ", end="", flush=True)
    options = {"streamer": job.streamer()} if streams else {}
    return context, job.answer_sample(context, sample, **options)
