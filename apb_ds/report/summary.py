"""Scores of many samples in a few numbers: means by label, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
CHUNK = 100  # resamples at a time
SEED = 0
LEVEL = 0.95


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of a task's results.

    Parameters
    ----------
    results : one mapping per sample, with ``labels`` and either ``score`` (0 to 1, or None), ``exact`` and ``seconds``,
        or ``error``; ``approximate`` says whether the method is approximate, and so runs only short documents exact

    Returns
    -------
    dict
        ``all``: the numbers over all samples. ``cells``: for each combination of labels, the labels and the same
        numbers. A failed sample has no score. A sample that an approximate method ran exact counts as ``exact`` and is
        left out of ``score``, since it says nothing about the approximation; ``score_with_exact`` includes it.
        ``measures``: mean and interval of each number in the results' ``measures``. ``prefill_flops``: mean operations
        of a prefill, of all ranks and of the slowest one.
    """
    cells: dict[tuple[tuple[str, Any], ...], list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault(tuple(result["labels"].items()), []).append(result)
    return {
        "all": _numbers(results),
        "cells": [{"labels": dict(labels), **_numbers(group)} for labels, group in cells.items()],
    }


def _numbers(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    answered = [result for result in results if "error" not in result]
    scored = [result for result in answered if result["score"] is not None]
    approximated = [result for result in answered if not (result["exact"] and result["approximate"])]
    counted = [result["score"] for result in approximated if result["score"] is not None]
    names = dict.fromkeys(name for result in approximated for name in result.get("measures", ()))
    measures = {}
    for name in names:
        values = [result["measures"][name] for result in approximated if result["measures"].get(name) is not None]
        measures[name] = {"mean": _mean(values), "interval": bootstrap_interval(values)}
    return {
        "measures": measures,
        "samples": len(results),
        "failed": len(results) - len(answered),
        "exact": sum(result["exact"] and result["approximate"] for result in answered),
        "score": _mean(counted),
        "interval": bootstrap_interval(counted),
        "score_with_exact": _mean([result["score"] for result in scored]),
        "prefill_flops": _mean_flops(answered),
        "prefill_s": _mean([result["prefill_s"] for result in answered]),
        "seconds": _mean([result["seconds"] for result in answered]),
    }


def _mean_flops(answered: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Return the mean operations of a prefill, over the samples for which they were counted."""
    counts = [result["flops"] for result in answered if result.get("flops")]
    return {name: fmean(flops[name] for flops in counts) for name in ("total", "slowest_rank")} if counts else None


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% bootstrap interval of the mean (percentiles of resampled means); None for fewer than two values.

    The same values always give the same interval: resampling has a fixed seed.
    """
    return _interval(np.asarray(values, dtype=np.float64), lambda drawn: drawn.mean(axis=1))


def bootstrap_ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the 95% bootstrap interval of ``mean(first) / mean(second)``, resampling whole pairs.

    None for fewer than two pairs. The second numbers must be positive.
    """
    numbers = np.asarray(pairs, dtype=np.float64)
    return _interval(numbers, lambda drawn: drawn[..., 0].mean(axis=1) / drawn[..., 1].mean(axis=1))


def _interval(numbers: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
    """Return percentiles of a statistic over resampled rows; `statistic` takes (resamples, rows, ...)."""
    if len(numbers) < 2:
        return None
    generator = np.random.default_rng(SEED)
    chosen = (generator.integers(len(numbers), size=(CHUNK, len(numbers))) for _ in range(NUM_RESAMPLES // CHUNK))
    found = np.concatenate([statistic(numbers[rows]) for rows in chosen])
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
