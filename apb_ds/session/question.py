"""A job with one question: prefill, answer, and what both took."""

from __future__ import annotations

from typing import Any

from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.progress import prefill_progress
from apb_ds.report.record import rate
from apb_ds.session.request import Answer, Run, count_prefill, plan_metrics, usage_metrics
from apb_ds.tasks import Sample


def serve_question(run: Run) -> dict[str, Any]:
    """Answer the task's sample; return its parts of the record, the same on every rank."""
    steps, loaded, settings = run.steps, run.loaded, run.settings
    sample = run.sample_from_first(lambda: _only_sample(run))
    num_document, num_query = sample.document_ids.shape[1], sample.query_ids.shape[1]
    method = steps.together(lambda: run.set_up(sample.query_position, num_document, sample.anchor_query_ids.shape[1]))
    reset_peak_memory(loaded.device)
    sent_before = run.group.bytes_sent
    streams = bool(getattr(settings.task, "stream", False))
    context, answer = steps.together(lambda: _ask(run, sample, streams))
    metrics = plan_metrics(context, run.group)
    metrics |= usage_metrics(run.group, run.group.bytes_sent - sent_before, peak_memory_bytes(loaded.device))
    new_tokens = len(answer.tokens)
    metrics |= {
        "query_tokens": num_query,
        "prefill_flops": count_prefill(run.engine, context, num_query),
        "query_s": answer.query_s,
        "decode_s": answer.decode_s,
        "new_tokens": new_tokens,
        "decode_tokens_per_s": rate(new_tokens - 1, answer.decode_s),  # the first comes with the query
    }
    prediction, truth = run.text_of(answer.tokens), sample.ground_truth
    score = settings.task.score(sample, prediction)
    task = {
        "name": settings.task.name,
        "ground_truth": truth,
        "prediction": prediction,
        "correct": None if score is None else score == 1.0,
        "random_ids": sample.random_ids,
        "query_position": sample.query_position,
        "streamed": streams,
    }
    return {"task": task, "metrics": metrics, "exact": context.plan.exact, "method": method.resolved()}


def _only_sample(run: Run) -> Sample:
    samples = iter(run.settings.task.samples(run.tokenizer, run.vocab_size, run.settings.seed))
    sample = next(samples)
    if next(samples, None) is not None:
        raise ValueError(f"task={run.settings.task.name} has several samples; launch/eval.py answers and scores them.")
    return sample


def _ask(run: Run, sample: Sample, streams: bool) -> tuple[Any, Answer]:
    run.seed_everything()
    num_positions = sample.document_ids.shape[1] + sample.query_ids.shape[1] + sample.max_new_tokens
    with prefill_progress(run.error_console, shown=run.is_first) as progress:
        context = run.engine.prefill(
            sample.document_ids, sample.anchor_query_ids, max_positions=num_positions, progress=progress
        )
    options = {}
    if streams:
        options["streamer"] = run.streamer()
    if streams and run.is_first:
        print("Answer: ", end="", flush=True)
    return context, run.answer(context, sample.query_ids, sample.max_new_tokens, sample.generate, **options)
