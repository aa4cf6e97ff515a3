"""What errors of other libraries are called in ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: many have a page of advice below it."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
