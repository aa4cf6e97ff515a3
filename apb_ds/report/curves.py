"""Evaluations along one setting: a mean with its interval at each value, a line for each choice of the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from apb_ds.config import DEFAULT_COMPRESSION_RATIO, is_number, suggest
from apb_ds.report.figures import mean_and_interval
from apb_ds.report.pairing import DIVERGENCE, measures_of
from apb_ds.report.results import Result, check_same_task, name_settings

RATIO = "method.compression_ratio"


def gather_curves(results: Sequence[Result], against: str) -> dict[str, Any]:
    """Return means of evaluations along a setting; their samples may differ.

    Parameters
    ----------
    against : dotted path of a setting in ``summary.json``, such as ``method.hosts``

    Returns
    -------
    dict
        ``lines``: name and points (value, mean, interval, samples, prefill_flops, directory). ``levels``: the same for
        evaluations without that setting; dense, for example, has no hosts. ``measure``: ``score``, or ``kl`` for the
        fidelity task.

    Raises
    ------
    ValueError
        If the setting is unknown or the same everywhere, tasks differ, or two evaluations have the same settings.
    """
    values = [_value(result, against) for result in results]
    known = list(dict.fromkeys(path for result in results for path in result.settings))
    if against not in known:
        raise ValueError(f"--against {against!r} is not a setting of these evaluations.{suggest(against, known)}")
    given = {json.dumps(value) for value in values if value is not None}
    if len(given) < 2:
        differing = [path for path in known if len({json.dumps(result.settings.get(path)) for result in results}) > 1]
        raise ValueError(
            f"--against {against} needs two values or more, and there is {', '.join(sorted(given)) or 'none'}; "
            f"these differ: {', '.join(differing) or 'nothing'}."
        )
    check_same_task(results)
    measures = measures_of(results)
    measure = DIVERGENCE if DIVERGENCE in measures else measures[0]
    others = [{path: value for path, value in result.settings.items() if path != against} for result in results]
    lines: dict[str, list[dict[str, Any]]] = {}
    levels = []
    for result, name, value in zip(results, name_settings(others), values, strict=True):
        if value is None:
            levels.append({"name": name, **_point(result, measure, None)})
        else:
            lines.setdefault(name, []).append(_point(result, measure, value))
    return {
        "task": results[0].task,
        "against": against,
        "measure": measure,
        "lines": [{"name": name, "points": _in_order(name, points, against)} for name, points in lines.items()],
        "levels": levels,
    }


def _value(result: Result, against: str) -> Any:
    """Return the setting's value, or its default if that is a number; else None."""
    value = result.settings.get(against)
    is_default = value is None and not result.is_exact_method and result.settings.get("method.passing_length") is None
    return DEFAULT_COMPRESSION_RATIO if against == RATIO and is_default else value


def _point(result: Result, measure: str, value: Any) -> dict[str, Any]:
    numbers = result.summary["all"]
    mean, interval = mean_and_interval(numbers, measure)
    return {
        "value": value,
        "mean": mean,
        "interval": interval,
        "samples": numbers["samples"] - numbers["failed"] - numbers["exact"],
        "prefill_flops": numbers.get("prefill_flops"),
        "prefill_s": numbers["prefill_s"],
        "directory": str(result.directory),
    }


def _in_order(name: str, points: list[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    seen: dict[str, str] = {}
    for point in points:
        before = seen.setdefault(json.dumps(point["value"]), point["directory"])
        if before != point["directory"]:
            raise ValueError(
                f"{before} and {point['directory']} are both {name} at {against}={point['value']}; leave one out."
            )
    is_numeric = all(is_number(point["value"]) for point in points)
    return sorted(points, key=lambda point: point["value"]) if is_numeric else points
