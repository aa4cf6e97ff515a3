"""Checks that settings of several tasks share."""

from __future__ import annotations

import math
from typing import Any

from apb_ds.config import check_integer


def is_number(value: object) -> bool:
    """Return whether the value is a finite number; a bool is not one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_integers(config: Any, **minimums: int) -> None:
    """Raise ValueError unless the named fields are integers of at least these; None is allowed as a default."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is not None or getattr(type(config), name) is not None:
            check_integer(f"task.{name}", value, minimum)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a list's items, or the one value."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def distinct(field: str, value: Any) -> tuple[Any, ...]:
    """Return a list's items, or the one value; ValueError for an empty list or repeated items."""
    values = as_tuple(value)
    if not values or any(values.count(one) > 1 for one in values):
        raise ValueError(f"{field}={value!r} must name at least one, and none of them twice.")
    return values


def check_optional_text(field: str, value: object, what: str) -> None:
    """Raise ValueError unless the value is a string that is not empty, or None; `what` says what it names."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{field}={value!r} must be {what}.")
