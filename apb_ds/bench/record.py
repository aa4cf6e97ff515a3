"""The record of a benchmark: every case with its times, memory and traffic, and all that these depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from apb_ds.bench.clocks import summarise_clocks
from apb_ds.bench.config import BenchConfig
from apb_ds.bench.emulate import summarise_ranks
from apb_ds.bench.measure import Runs
from apb_ds.bench.timing import Spread
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
    all_runs: Sequence[Runs],
    is_complete: bool = True,
) -> Record:
    """Return the record as JSON has it.

    Parameters
    ----------
    values : the composed config, but for ``bench``
    is_complete : False while there is more to measure
    """
    cases = [case_record(bench, runs) for runs in all_runs]
    _compare(cases, bench.methods[0])
    return {
        "complete": is_complete,
        "cases": cases,
        "baseline": bench.methods[0],
        "emulated": bench.emulate_ranks is not None,
        "link": _link(bench),
        "memory": peak_memory_kind(loaded.device),
        "model": {
            "source": loaded.source,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "layers": _layers(settings, loaded),
            "random_weights": settings.model.is_dummy,
        },
        "seed": settings.seed,
        "bench": asdict(bench),
        "config": values,
        **environment(loaded.device),
    }


def case_record(bench: BenchConfig, runs: Runs) -> Record:
    """Return what one case says. Of several real ranks a time is the slowest one's, memory the largest."""
    case = runs.case
    record: Record = {
        "name": case.name,
        "method": case.method,
        "document_tokens": case.length,
        "ranks": case.ranks,
        "emulated": case.emulated,
        "kernels": runs.kernels or {"prefill": "sdpa", "decode": "sdpa"},
        "settings": None if case.config is None else case.config.resolved(),
        "status": FAILED if runs.error else OK,
        "error": runs.error,
    }
    if runs.error:
        return record
    if case.emulated:
        record |= _plan_record(runs.emulated[-1][0].plan) | summarise_ranks(bench, runs.emulated)
    else:
        record |= _plan_record(runs.ranks[-1][0].plan) | _real_record(bench, runs)
    record["tokens_per_s"] = case.length / record["prefill"]["median_s"]
    record["clocks"] = summarise_clocks(runs.clocks)
    record["allocated_before_bytes"] = runs.allocated_before_bytes
    record["breakdown"] = [_breakdown_record(parts, record["prefill"]["median_s"]) for parts in runs.breakdown]
    return record


def _real_record(bench: BenchConfig, runs: Runs) -> Record:
    def slowest(name: str) -> list[float]:
        return [max(getattr(run, name) for run in ranks) for ranks in runs.ranks]

    last = runs.ranks[-1]
    record: Record = {
        "prefill": Spread.of(slowest("prefill_s")).as_dict("s"),
        "prefill_peak_memory_bytes": max(run.prefill_peak_bytes for ranks in runs.ranks for run in ranks),
        "peak_memory_bytes": max(run.peak_bytes for ranks in runs.ranks for run in ranks),
        "prefill_bytes_sent": [run.prefill_bytes_sent for run in last],
        "answer_bytes_sent": [run.answer_bytes_sent for run in last],
    }
    if bench.num_new_tokens:
        per_token = [1000 * seconds / bench.decode_tokens for seconds in slowest("decode_s")]
        record["query"] = Spread.of(slowest("query_s")).as_dict("s")
        record["decode"] = Spread.of(per_token).as_dict("ms_per_token")
    return record


def _plan_record(plan: Plan | None) -> Record:
    """Return how the document was split; nothing of the plain model's."""
    if plan is None:
        return {"hosts": None, "rounds": 1, "exact": True}
    return {
        "hosts": plan.hosts,
        "rounds": len(plan.rounds),
        "exact": plan.exact,
        "anchor_length": plan.anchor_length,
        "passing_length": plan.passing_length,
    }


def _breakdown_record(parts: Record, median_s: float) -> Record:
    """Add what a prefill takes over its matrix products and attention; the prefill itself ran without a profiler."""
    products = sum(parts["parts_s"][name] for name in PRODUCTS)
    return {**parts, "prefill_over_products": median_s / products if products > 0 else None}


def _compare(cases: list[Record], baseline: str) -> None:
    """Add to each case how much faster its prefill is than the first of the baseline's at the same length."""
    medians: dict[int, float] = {}
    for case in cases:
        if case["method"] == baseline and case["status"] == OK:
            medians.setdefault(case["document_tokens"], case["prefill"]["median_s"])
    for case in cases:
        median = medians.get(case["document_tokens"])
        comparable = median is not None and case["status"] == OK
        case["speedup"] = median / case["prefill"]["median_s"] if comparable and median else None


def _layers(settings: Settings, loaded: LoadedModel) -> Record:
    """Return how many layers were measured, and of how many, where the model was cut and its geometry is known."""
    measured = int(loaded.model.config.num_hidden_layers)
    if settings.model.num_layers is None:
        return {"measured": measured, "of": measured}
    full = {**settings.model.geometry, **settings.model.overrides}.get("num_hidden_layers")
    return {"measured": measured, "of": full}


def _link(bench: BenchConfig) -> Record | None:
    """Return the link model of an emulation."""
    if bench.emulate_ranks is None:
        return None
    return {
        "gb_per_s": bench.link_gb_per_s,
        "latency_us": bench.link_latency_us,
        "model": "bytes sent / link_gb_per_s + collectives * link_latency_us",
    }
