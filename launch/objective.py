"""What a job returns to a sweeper that optimizes: numbers of its record."""

from __future__ import annotations

import math
from typing import Any

from apb_ds.config import suggest
from apb_ds.report.results import flatten


def objective_of(record: dict[str, Any], asked: object) -> float | tuple[float, ...] | None:
    """Return the number at a path of a job's record, or several; not a number for a job that failed.

    Parameters
    ----------
    asked : a dotted path such as ``metrics.prefill_s``, a list of them, or None

    Raises
    ------
    ValueError
        If the record of a job that succeeded has no such number.
    """
    if asked is None:
        return None
    if isinstance(asked, list):
        return tuple(_number(record, path) for path in asked)
    return _number(record, asked)


def _number(record: dict[str, Any], path: object) -> float:
    if record["status"] != "ok":
        return math.nan
    numbers = {name: value for name, value in flatten(record).items() if isinstance(value, (int, float))}
    if path not in numbers:
        raise ValueError(f"objective={path} is not a number in a job's record.{suggest(path, sorted(numbers))}")
    return float(numbers[str(path)])
