"""Evaluations of the same samples: paired differences to one of them, and ratios of divergences, with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from apb_ds.config import suggest
from apb_ds.report.results import Labels, Result, check_same_task
from apb_ds.report.summary import bootstrap_interval, bootstrap_ratio

DIVERGENCE = "kl"
Pair = tuple[dict[str, Any], dict[str, Any]]


def compare_results(results: Sequence[Result], ratio_to: str | None = None) -> dict[str, Any]:
    """Compare evaluations of one task.

    Samples are the same if prompt and labels are. A sample that failed in either of two evaluations is left out of
    both, and so is one that ran exact under an approximate method: it says nothing about the approximation.

    Parameters
    ----------
    results : two or more, as `read_results` returned them
    ratio_to : name of the result whose divergence divides the others'; by default that of ``star``, else of the first
        approximate method

    Returns
    -------
    dict
        ``jobs``: settings and overall numbers. ``cells``: each job's numbers by labels, and last over all. ``pairs``:
        for each job, cell and measure the mean difference to the ``baseline`` with its interval, and how many samples
        were left out, and why. ``ratios``: of divergences, for the fidelity task. The baseline is dense attention,
        else the first exact method, else the first job.

    Raises
    ------
    ValueError
        If there are fewer than two, their tasks differ, they share no sample, or no result is named `ratio_to`.
    """
    if len(results) < 2:
        raise ValueError(f"a comparison needs two evaluations or more, and there is {len(results)}.")
    check_same_task(results)
    exact = [result for result in results if result.is_exact_method]
    dense = [result for result in exact if result.method == "dense"]
    baseline = (dense or exact or list(results))[0]
    others = [result for result in results if result is not baseline]
    for other in others:
        if not other.samples.keys() & baseline.samples.keys():
            raise ValueError(
                f"{other.directory} and {baseline.directory} share no sample (prompt and labels): give them the same "
                f"task settings, seed and tokenizer; or compare only their means with --against SETTING."
            )
    measures = measures_of(results)
    if ratio_to is not None and DIVERGENCE not in measures:
        raise ValueError(f"--ratio-to is for task=fidelity, which measures {DIVERGENCE}; this is task={baseline.task}.")
    return {
        "task": baseline.task,
        "measures": measures,
        "baseline": baseline.name,
        "jobs": [
            {
                "name": result.name,
                "directory": str(result.directory),
                "method": result.method,
                "settings": result.settings,
                **result.summary["all"],
            }
            for result in results
        ],
        "cells": _cells(results),
        "pairs": [pair for other in others for pair in _compare_pair(other, baseline, measures)],
        "ratios": _ratios(results, ratio_to) if DIVERGENCE in measures else [],
    }


def measures_of(results: Sequence[Result]) -> list[str]:
    """Return what the results can be compared by: the fidelity task's measures if any sample has them, else scores."""
    names = dict.fromkeys(name for result in results for name in result.summary["all"]["measures"])
    return list(names) or ["score"]


def _cells(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return each job's numbers by labels, and under the labels None over all."""
    cells: dict[str, dict[str, Any]] = {}
    for result in results:
        for numbers in result.summary["cells"]:
            key = json.dumps(numbers["labels"], sort_keys=True)
            cell = cells.setdefault(key, {"labels": numbers["labels"], "jobs": {}})
            cell["jobs"][result.name] = {name: value for name, value in numbers.items() if name != "labels"}
    return [*cells.values(), {"labels": None, "jobs": {result.name: result.summary["all"] for result in results}}]


def _pair_up(job: Result, other: Result) -> Iterator[tuple[Labels | None, list[Pair], dict[str, int]]]:
    """Yield by labels, and last over all (None), the pairs of samples, and how many samples were left out.

    ``failed`` in either evaluation, ``exact`` under an approximate method, and ``unpaired``: in one evaluation only.
    """
    by_labels: dict[str | None, tuple[Labels | None, list[Pair], dict[str, int]]] = {}
    total: tuple[None, list[Pair], dict[str, int]] = (None, [], {"failed": 0, "exact": 0, "unpaired": 0})
    for key in dict.fromkeys([*other.samples, *job.samples]):
        found = [result.samples[key] for result in (job, other) if key in result.samples]
        group = by_labels.setdefault(key[0], (found[-1]["labels"], [], {"failed": 0, "exact": 0, "unpaired": 0}))
        for _, pairs, counts in (group, total):
            if len(found) < 2:
                counts["unpaired"] += 1
            elif any("error" in sample for sample in found):
                counts["failed"] += 1
            elif any(
                sample["exact"] and not result.is_exact_method
                for sample, result in zip(found, (job, other), strict=True)
            ):
                counts["exact"] += 1
            else:
                pairs.append((found[0], found[1]))
    yield from (*by_labels.values(), total)


def _compare_pair(job: Result, baseline: Result, measures: Sequence[str]) -> Iterator[dict[str, Any]]:
    for labels, pairs, counts in _pair_up(job, baseline):
        for measure in measures:
            differences = [first - second for first, second in _values(pairs, measure)]
            yield {
                "job": job.name,
                "baseline": baseline.name,
                "labels": labels,
                "measure": measure,
                "samples": len(differences),
                "difference": sum(differences) / len(differences) if differences else None,
                "interval": bootstrap_interval(differences),
                **counts,
            }


def _values(pairs: Sequence[Pair], measure: str) -> list[tuple[float, float]]:
    """Return a measure of both samples of each pair in which both have it."""
    found = []
    for pair in pairs:
        first, second = (sample.get("measures", {}).get(measure, sample.get(measure)) for sample in pair)
        if first is not None and second is not None:
            found.append((float(first), float(second)))
    return found


def _ratios(results: Sequence[Result], ratio_to: str | None) -> list[dict[str, Any]]:
    """Return each approximate job's divergence over that of the reference."""
    approximate = [result for result in results if not result.is_exact_method]
    by_name = {result.name: result for result in approximate}
    if ratio_to is not None and ratio_to not in by_name:
        raise ValueError(
            f"--ratio-to {ratio_to!r} is not an approximate job of these; use one of {'; '.join(by_name) or 'none'}."
            f"{suggest(ratio_to, by_name)}"
        )
    stars = [result for result in approximate if result.method == "star"]
    reference = by_name[ratio_to] if ratio_to is not None else next(iter([*stars, *approximate]), None)
    return [_divide(job, reference) for job in approximate if reference is not None and job is not reference]


def _divide(job: Result, reference: Result) -> dict[str, Any]:
    """Return the ratio of mean divergences over all common samples, and for each combination of labels."""
    *groups, (_, pairs, counts) = _pair_up(job, reference)
    cells: list[dict[str, Any]] = []
    for labels, of_labels, _ in groups:
        values = _values(of_labels, DIVERGENCE)
        cells.append({"labels": labels, "samples": len(values), "ratio": _ratio(values)})
    values = _values(pairs, DIVERGENCE)
    can_resample = all(second > 0 for _, second in values)  # else a resample's mean may be 0
    return {
        "job": job.name,
        "reference": reference.name,
        "measure": DIVERGENCE,
        "samples": len(values),
        "ratio": _ratio(values),
        "interval": bootstrap_ratio(values) if can_resample else None,
        **counts,
        "largest": max((cell["ratio"] for cell in cells if cell["ratio"] is not None), default=None),
        "cells": cells,
    }


def _ratio(values: Sequence[tuple[float, float]]) -> float | None:
    """Return the ratio of means; None if the divisor is 0."""
    divisor = sum(second for _, second in values)
    return sum(first for first, _ in values) / divisor if divisor > 0 else None
