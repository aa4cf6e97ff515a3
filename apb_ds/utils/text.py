"""Short forms of other libraries' error messages, to quote in ours."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_CHARACTERS = 300
MAX_SHOWN = 3
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, plus the second if the first ends in a colon.

    The rest is often a page of advice. A line may list every model that exists: it is cut to `MAX_CHARACTERS`.
    """
    lines = [line.strip() for line in COLOURS.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(".:") if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rstrip() + " ..."


def kind_and_line(error: BaseException) -> str:
    """Return the error's class and first line, such as ``KeyError: 'weight_map'``."""
    return f"{type(error).__name__}: {first_line(error)}"


def list_some(items: Sequence[str], separator: str = ", ") -> str:
    """Return the first `MAX_SHOWN` items, and how many more there are."""
    shown = separator.join(items[:MAX_SHOWN])
    return shown if len(items) <= MAX_SHOWN else f"{shown}{separator.rstrip()} and {len(items) - MAX_SHOWN} more"
