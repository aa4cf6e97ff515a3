"""The record of a benchmark: every case with its times, memory and traffic, and what these depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from apb_ds.bench.clocks import summarise_clocks
from apb_ds.bench.config import BenchConfig
from apb_ds.bench.emulate import summarise_ranks
from apb_ds.bench.interleaving import summarise_interruptions
from apb_ds.bench.measure import CaseResult
from apb_ds.bench.sequences import summarise_rounds
from apb_ds.bench.timing import spread
from apb_ds.loading import LoadedModel
from apb_ds.ops.profiling import ATTENTION, FFN, O_PROJECTION, QKV
from apb_ds.plan import Plan
from apb_ds.report.memory import peak_memory_kind
from apb_ds.report.record import environment
from apb_ds.session import Settings

Record = dict[str, Any]
OK, FAILED = "ok", "failed"
PRODUCTS = (QKV, O_PROJECTION, FFN, ATTENTION)


def make_record(
    values: Record,
    bench: BenchConfig,
    settings: Settings,
    loaded: LoadedModel,
    results: Sequence[CaseResult],
    is_complete: bool = True,
) -> Record:
    """Return the record, for JSON.

    Parameters
    ----------
    values : the composed config without ``bench``
    is_complete : False while there is more to measure
    """
    cases = [case_record(bench, result) for result in results]
    _compare(cases, bench.methods[0])
    is_emulated = bench.emulate_ranks is not None
    link = {
        "gb_per_s": bench.link_gb_per_s,
        "latency_us": bench.link_latency_us,
        "model": "bytes sent / link_gb_per_s + collectives * link_latency_us",
    }
    return {
        "complete": is_complete,
        "cases": cases,
        "baseline": bench.methods[0],
        "emulated": is_emulated,
        "link": link if is_emulated else None,
        "memory": peak_memory_kind(loaded.device),
        "model": {
            "source": loaded.source,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "shard_weights": loaded.shard_weights,
            "layers": _layers(settings, loaded),
            "random_weights": settings.model.is_dummy,
        },
        "seed": settings.seed,
        "bench": asdict(bench),
        "config": values,
        **environment(loaded.device),
    }


def case_record(bench: BenchConfig, result: CaseResult) -> Record:
    """Return the record of one case. Over several real ranks, times are the slowest's and memory the largest."""
    case = result.case
    record: Record = {
        "name": case.name,
        "method": case.method,
        "document_tokens": case.length,
        "ranks": case.ranks,
        "emulated": case.emulated,
        "kernels": result.kernels or {"prefill": "sdpa", "decode": "sdpa"},
        "settings": None if case.config is None else case.config.resolved(),
        "status": FAILED if result.error else OK,
        "error": result.error,
    }
    if result.error:
        return record
    if case.emulated:
        record |= _plan_record(result.emulated[-1][0].plan) | summarise_ranks(bench, result.emulated)
    else:
        record |= _plan_record(result.ranks[-1][0].plan) | _summarise_real(bench, result)
    median_s = record["prefill"]["median_s"]
    record["tokens_per_s"] = case.length / median_s
    record["sequences"] = summarise_rounds(bench, result.rounds, result.slot_bytes)
    record["interleaving"] = summarise_interruptions(result.apart, result.interleaved, max(bench.sequences, default=0))
    record["clocks"] = summarise_clocks(result.clocks)
    record["allocated_before_bytes"] = result.allocated_before_bytes
    record["breakdown"] = []
    for parts in result.breakdown:
        products = sum(parts["parts_s"][name] for name in PRODUCTS)
        record["breakdown"].append({**parts, "prefill_over_products": median_s / products if products > 0 else None})
    return record


def _summarise_real(bench: BenchConfig, result: CaseResult) -> Record:
    def slowest(name: str) -> list[float]:
        return [max(getattr(times, name) for times in ranks) for ranks in result.ranks]

    last = result.ranks[-1]
    record: Record = {
        "prefill": spread(slowest("prefill_s"), "s"),
        "prefill_peak_memory_bytes": max(slowest("prefill_peak_bytes")),
        "peak_memory_bytes": max(slowest("peak_bytes")),
        "prefill_bytes_sent": [times.prefill_bytes_sent for times in last],
        "answer_bytes_sent": [times.answer_bytes_sent for times in last],
    }
    if bench.num_new_tokens:
        per_token = [1000 * seconds / bench.decode_tokens for seconds in slowest("decode_s")]
        record["query"] = spread(slowest("query_s"), "s")
        record["decode"] = spread(per_token, "ms_per_token")
    return record


def _plan_record(plan: Plan | None) -> Record:
    """Return how the document was split; the plain model (None) does not split it."""
    if plan is None:
        return {"hosts": None, "rounds": 1, "exact": True}
    names = ("hosts", "exact", "anchor_length", "passing_length")
    return {**{name: getattr(plan, name) for name in names}, "rounds": len(plan.rounds)}


def _compare(cases: list[Record], baseline: str) -> None:
    """Add to each case the speedup of its prefill over the baseline's first case of the same length."""
    medians: dict[int, float] = {}
    for case in cases:
        if case["method"] == baseline and case["status"] == OK:
            medians.setdefault(case["document_tokens"], case["prefill"]["median_s"])
    for case in cases:
        median = medians.get(case["document_tokens"])
        case["speedup"] = median / case["prefill"]["median_s"] if median and case["status"] == OK else None


def _layers(settings: Settings, loaded: LoadedModel) -> Record:
    """Return how many layers were measured, and of how many if that is known."""
    measured = int(loaded.model.config.num_hidden_layers)
    if settings.model.num_layers is None:
        return {"measured": measured, "of": measured}
    full = {**settings.model.geometry, **settings.model.overrides}.get("num_hidden_layers")
    return {"measured": measured, "of": full}
