"""Numbers as people read them."""

from __future__ import annotations

from apb_ds.report.fitting import ABSENT


def format_count(number: float) -> str:
    """Return a whole number with its thousands apart, such as ``130 944``."""
    return f"{number:,.0f}".replace(",", " ")


def format_number(value: float | None) -> str:
    """Return a number to about three digits."""
    if value is None:
        return ABSENT
    return f"{value:.1f}" if value < 100 else format_count(value)


def format_percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def format_rate(tokens_per_s: float | None) -> str:
    return ABSENT if tokens_per_s is None else f"{format_number(tokens_per_s)} tokens/s"


def format_seconds(seconds: float | None) -> str:
    """Return seconds to at least three digits."""
    if seconds is None:
        return ABSENT
    return f"{seconds:.2f}" if seconds >= 10 else f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.4f}"


def format_tflop(number: float | None) -> str:
    """Return operations in units of 10**12, to three digits."""
    if number is None:
        return ABSENT
    tera = number / 1e12
    return format_count(tera) if tera >= 1000 else f"{tera:.3g}"


def format_bytes(number: float) -> str:
    """Return a byte count in the unit that keeps it short."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
