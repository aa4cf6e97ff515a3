"""Prefill times of APB and of the plain dense model, taken in turns on the same prompt."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from apb_ds.config import check_choice, check_integer
from apb_ds.engine import APBEngine
from apb_ds.entry import init_inference
from apb_ds.linears import onednn_linears
from apb_ds.loading import LoadedModel, load_model
from apb_ds.parallel.groups import SequenceGroup, world_group
from apb_ds.report.memory import peak_memory_bytes, peak_memory_kind, reset_peak_memory
from apb_ds.report.record import environment
from apb_ds.session import read_settings
from apb_ds.tasks import Sample

BENCH_METHODS = ("dense", "dense_onednn", "apb")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Parameters
    ----------
    methods : list of str
        ``apb``: the engine with the settings under ``method``. ``dense``: the plain transformers model with sdpa, on
        one rank. ``dense_onednn``: the same with the linear layers that the engine uses on CPU.
    repeats : int
        Timed runs of each method, in turns, so that a drift of the machine meets all of them.
    warmup : int
        Runs of each method before that.
    """

    methods: tuple[str, ...] = ("dense", "apb")
    repeats: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(f"bench.methods is empty; use some of {', '.join(BENCH_METHODS)}.")
        for method in self.methods:
            check_choice("bench.methods", method, BENCH_METHODS)
        check_integer("bench.repeats", self.repeats, 1)
        check_integer("bench.warmup", self.warmup, 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BenchConfig:
        """Build from a mapping; an unknown key is a ValueError that names the nearest one."""
        for key in values:
            check_choice("bench key", key, cls.__dataclass_fields__)
        if "methods" in values:
            values = {**values, "methods": tuple(values["methods"] or ())}
        return cls(**values)


def run_bench(values: dict[str, Any]) -> tuple[dict[str, Any], SequenceGroup]:
    """Measure what a composed config asks for, all ranks together.

    Returns
    -------
    dict
        The record: per method the seconds of each run, their median and spread, tokens per second and peak memory;
        ``speedup`` is the median of each other method over that of APB.
    SequenceGroup
        The ranks that took part.

    Raises
    ------
    ValueError
        For settings that cannot be measured.
    """
    bench = BenchConfig.from_dict(dict(values.pop("bench", None) or {}))
    settings = read_settings(values)
    group = world_group(settings.timeout_s)
    if bench.methods != ("apb",) and group.world_size > 1:
        raise ValueError("bench.methods: dense runs on one rank; measure it without a launcher, or use [apb].")
    loaded = load_model(settings.model)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    sample = next(settings.task.samples(loaded.tokenizer, vocabulary, settings.seed))
    engine = init_inference(
        loaded.model,
        settings.method_for(sample.query_position),
        group=group,
        retaining_heads=settings.retaining_heads,
    )
    runs: dict[str, list[float]] = {method: [] for method in bench.methods}
    peaks: dict[str, int] = dict.fromkeys(bench.methods, 0)
    for repeat in range(-bench.warmup, bench.repeats):
        for method in bench.methods:
            reset_peak_memory(loaded.device)
            seconds = max(group.gather_objects(_time_prefill(method, engine, loaded, sample)))
            if repeat >= 0:
                runs[method].append(seconds)
                peaks[method] = max(peaks[method], *group.gather_objects(peak_memory_bytes(loaded.device)))
    return _record(values, bench, engine, loaded, sample, runs, peaks), group


def _time_prefill(method: str, engine: APBEngine, loaded: LoadedModel, sample: Sample) -> float:
    if method != "apb":
        document_ids = sample.document_ids.to(loaded.device)
        linears = onednn_linears(loaded.model, document_ids.shape[1]) if method == "dense_onednn" else nullcontext()
        with linears:
            return time_dense_prefill(loaded.model, document_ids)
    return engine.prefill(sample.document_ids, sample.query_ids).prefill_s


@torch.no_grad()
def time_dense_prefill(model: Any, document_ids: Tensor) -> float:
    """Return the seconds of the plain model's forward over the document, with its cache and the last logits only."""
    _synchronize(document_ids.device)
    began = time.perf_counter()
    model(input_ids=document_ids, use_cache=True, logits_to_keep=1)
    _synchronize(document_ids.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(
    values: dict[str, Any],
    bench: BenchConfig,
    engine: APBEngine,
    loaded: LoadedModel,
    sample: Sample,
    runs: dict[str, list[float]],
    peaks: dict[str, int],
) -> dict[str, Any]:
    num_tokens = sample.document_ids.shape[1]
    methods: dict[str, dict[str, Any]] = {
        method: {
            "prefill_s": seconds,
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "tokens_per_s": num_tokens / statistics.median(seconds),
            "peak_memory_bytes": peaks[method],
        }
        for method, seconds in runs.items()
    }
    speedup = {}
    if "apb" in methods:
        others = [method for method in methods if method != "apb"]
        speedup = {method: methods[method]["median_s"] / methods["apb"]["median_s"] for method in others}
    return {
        "document_tokens": num_tokens,
        "ranks": engine.group.world_size,
        "methods": methods,
        "speedup": speedup,
        "kernels": engine.kernel_names,
        "memory": peak_memory_kind(loaded.device),
        "model": {"source": loaded.source, "dtype": str(loaded.dtype).removeprefix("torch.")},
        "bench": asdict(bench),
        "settings": asdict(engine.apb_config),
        "config": values,
        **environment(loaded.device),
    }
