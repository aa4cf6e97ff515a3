"""Evaluations of the same samples: paired differences to one of them, and ratios of divergences, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from apb_ds.config import suggest
from apb_ds.report.results import Key, Labels, Result
from apb_ds.report.summary import bootstrap_interval, bootstrap_ratio

DIVERGENCE = "kl"
Pair = tuple[dict[str, Any], dict[str, Any]]


def compare_results(results: Sequence[Result], ratio_to: str | None = None) -> dict[str, Any]:
    """Compare evaluations of one task.

    Samples are the same where prompt and labels are. One that failed in either of two evaluations is left out of both,
    and so is one that ran exact under an approximate method: it says nothing about the approximation.

    Parameters
    ----------
    results : two or more, as `read_results` returned them
    ratio_to : name of the result whose divergence the others' are divided by; by default that of ``star``, else of the
        first approximate method

    Returns
    -------
    dict
        ``jobs``: settings and overall numbers. ``cells``: each job's numbers by labels, and last over all. ``pairs``:
        for each job, cell and measure the mean difference to the ``baseline`` with its interval, and how many samples
        were left out, and why. ``ratios``: of divergences, for the fidelity task. The baseline is dense attention, or
        else the first exact method, or else the first job.

    Raises
    ------
    ValueError
        If there are fewer than two, their tasks differ, they share no sample, or there is no result `ratio_to`.
    """
    _check_comparable(results)
    exact = [result for result in results if result.is_exact_method]
    dense = [result for result in exact if result.method == "dense"]
    baseline = (dense or exact or list(results))[0]
    others = [result for result in results if result is not baseline]
    for other in others:
        if not other.samples.keys() & baseline.samples.keys():
            raise ValueError(
                f"{other.directory} and {baseline.directory} share no sample (prompt and labels): give them the same "
                f"task settings, seed and tokenizer; or draw their means alone with --against SETTING."
            )
    measures = measures_of(results)
    if ratio_to is not None and DIVERGENCE not in measures:
        raise ValueError(f"--ratio-to is for task=fidelity, which measures {DIVERGENCE}; this is task={baseline.task}.")
    return {
        "task": baseline.task,
        "measures": measures,
        "baseline": baseline.name,
        "jobs": [_describe(result) for result in results],
        "cells": _cells(results),
        "pairs": [pair for other in others for pair in _pairs(other, baseline, measures)],
        "ratios": _ratios(results, ratio_to) if DIVERGENCE in measures else [],
    }


def measures_of(results: Sequence[Result]) -> list[str]:
    """Return what the results have numbers of: the fidelity task's measures where any sample has them, else scores."""
    names = dict.fromkeys(name for result in results for name in result.summary["all"]["measures"])
    return list(names) or ["score"]


def _check_comparable(results: Sequence[Result]) -> None:
    if len(results) < 2:
        raise ValueError(f"a comparison needs two evaluations or more, and there is {len(results)}.")
    first = results[0]
    for result in results:
        if result.task != first.task:
            raise ValueError(
                f"{first.directory} is of task={first.task} and {result.directory} of task={result.task}; compare "
                "evaluations of one task."
            )


def _describe(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "directory": str(result.directory),
        "method": result.method,
        "settings": result.settings,
        **result.summary["all"],
    }


def _cells(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return what each job has by labels, and under the labels None over all."""
    cells: dict[str, dict[str, Any]] = {}
    for result in results:
        for numbers in result.summary["cells"]:
            key = json.dumps(numbers["labels"], sort_keys=True)
            cell = cells.setdefault(key, {"labels": numbers["labels"], "jobs": {}})
            cell["jobs"][result.name] = {name: value for name, value in numbers.items() if name != "labels"}
    total = {"labels": None, "jobs": {result.name: result.summary["all"] for result in results}}
    return [*cells.values(), total]


def _labels_of(keys: Sequence[Key], *results: Result) -> list[Labels]:
    """Return the different labels of samples, in their order."""
    found: dict[str, Labels] = {}
    for key in keys:
        sample = next(result.samples[key] for result in results if key in result.samples)
        found.setdefault(key[0], sample["labels"])
    return list(found.values())


def _pairs(job: Result, baseline: Result, measures: Sequence[str]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys([*baseline.samples, *job.samples]))
    found = []
    for labels in (*_labels_of(keys, baseline, job), None):
        chosen = [key for key in keys if labels is None or key[0] == json.dumps(labels, sort_keys=True)]
        pairs, counts = _pair_up(job, baseline, chosen)
        for measure in measures:
            differences = [first - second for first, second in _values(pairs, measure)]
            found.append(
                {
                    "job": job.name,
                    "baseline": baseline.name,
                    "labels": labels,
                    "measure": measure,
                    "samples": len(differences),
                    "difference": sum(differences) / len(differences) if differences else None,
                    "interval": bootstrap_interval(differences),
                    **counts,
                }
            )
    return found


def _pair_up(job: Result, other: Result, keys: Sequence[Key]) -> tuple[list[Pair], dict[str, int]]:
    """Return the samples that both have, and how many were left out: failed, exact, or of one evaluation alone."""
    pairs: list[Pair] = []
    counts = {"failed": 0, "exact": 0, "unpaired": 0}
    for key in keys:
        if key not in job.samples or key not in other.samples:
            counts["unpaired"] += 1
            continue
        pair = job.samples[key], other.samples[key]
        if any("error" in sample for sample in pair):
            counts["failed"] += 1
        elif any(
            sample["exact"] and not result.is_exact_method for sample, result in zip(pair, (job, other), strict=True)
        ):
            counts["exact"] += 1
        else:
            pairs.append(pair)
    return pairs, counts


def _values(pairs: Sequence[Pair], measure: str) -> list[tuple[float, float]]:
    """Return a measure of both samples of each pair in which both have it."""
    found = []
    for first, second in pairs:
        values = [one.get("measures", {}).get(measure, one.get(measure)) for one in (first, second)]
        if None not in values:
            found.append((float(values[0]), float(values[1])))
    return found


def _ratios(results: Sequence[Result], ratio_to: str | None) -> list[dict[str, Any]]:
    """Return each approximate job's divergence over that of the reference."""
    approximate = [result for result in results if not result.is_exact_method]
    reference = _reference(approximate, ratio_to)
    return [_divide(job, reference) for job in approximate if reference is not None and job is not reference]


def _divide(job: Result, reference: Result) -> dict[str, Any]:
    """Return the ratio of mean divergences over all common samples, and that of each combination of labels."""
    keys = list(dict.fromkeys([*reference.samples, *job.samples]))
    pairs, counts = _pair_up(job, reference, keys)
    cells: list[dict[str, Any]] = []
    for labels in _labels_of(keys, reference, job):
        values = _values([pair for pair in pairs if pair[0]["labels"] == labels], DIVERGENCE)
        cells.append({"labels": labels, "samples": len(values), "ratio": _ratio(values)})
    values = _values(pairs, DIVERGENCE)
    can_divide = all(second > 0 for _, second in values)  # then no resample's mean is 0
    return {
        "job": job.name,
        "reference": reference.name,
        "measure": DIVERGENCE,
        "samples": len(values),
        "ratio": _ratio(values),
        "interval": bootstrap_ratio(values) if can_divide else None,
        **counts,
        "largest": max((cell["ratio"] for cell in cells if cell["ratio"] is not None), default=None),
        "cells": cells,
    }


def _reference(approximate: Sequence[Result], ratio_to: str | None) -> Result | None:
    if ratio_to is not None:
        for result in approximate:
            if result.name == ratio_to:
                return result
        names = [result.name for result in approximate]
        raise ValueError(
            f"--ratio-to {ratio_to!r} is no approximate job of these; use one of {'; '.join(names) or 'none here'}."
            f"{suggest(ratio_to, names)}"
        )
    stars = [result for result in approximate if result.method == "star"]
    return next(iter([*stars, *approximate]), None)


def _ratio(values: Sequence[tuple[float, float]]) -> float | None:
    """Return the ratio of means; None where there is nothing to divide by."""
    divisor = sum(second for _, second in values)
    return sum(first for first, _ in values) / divisor if divisor > 0 else None
