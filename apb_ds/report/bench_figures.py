"""Figures of a benchmark: speed over the document's length, and where a prefill's time goes."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from apb_ds.ops.profiling import PARTS
from apb_ds.report.bench_table import EMULATED, slowest_breakdown, title
from apb_ds.report.figures import EXTRA, legend_columns, look_of

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def draw_bench(directory: Path, record: Record) -> list[Path]:
    """Draw speed.png, and breakdown.png where the record has one; return the figures that there are now.

    Without matplotlib nothing is drawn, and the log says so.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no figure: matplotlib is not installed (pip install 'apb_ds[%s]').", EXTRA)
        return []
    cases = [case for case in record["cases"] if case["status"] == "ok"]
    figures = []
    if cases:
        _draw_speed(directory / "speed.png", record, cases)
        figures.append(directory / "speed.png")
    if any(case["breakdown"] for case in cases):
        _draw_breakdown(directory / "breakdown.png", record, [case for case in cases if case["breakdown"]])
        figures.append(directory / "breakdown.png")
    return figures


def _draw_speed(path: Path, record: Record, cases: list[Record]) -> None:
    """Draw tokens per second of each method over the document's length, from the slowest run to the fastest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(case["name"] for case in cases))
    for number, name in enumerate(names):
        of_name = [case for case in cases if case["name"] == name]
        lengths = [case["document_tokens"] for case in of_name]
        speeds = [case["tokens_per_s"] for case in of_name]
        slowest = [case["document_tokens"] / case["prefill"]["max_s"] for case in of_name]
        fastest = [case["document_tokens"] / case["prefill"]["min_s"] for case in of_name]
        below = [speed - low for speed, low in zip(speeds, slowest, strict=True)]
        above = [high - speed for speed, high in zip(speeds, fastest, strict=True)]
        style = "--" if of_name[0]["emulated"] else "-"
        axes.errorbar(lengths, speeds, yerr=(below, above), **look_of(number), linestyle=style, capsize=3, label=name)
    lengths = sorted({case["document_tokens"] for case in cases})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the document")
    note = f"\n({EMULATED}: the slowest rank's computation)" if record["emulated"] else ""
    axes.set_ylabel(f"prefill, tokens per second{note}")
    axes.set_title(title(record), wrap=True)
    figure.legend(loc="outside lower center", ncols=legend_columns(names))
    figure.savefig(path, dpi=120)


def _draw_breakdown(path: Path, record: Record, cases: list[Record]) -> None:
    """Draw a bar for each case: the seconds of each part, one behind the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    lefts = [0.0] * len(cases)
    breakdowns = [slowest_breakdown(case)["parts_s"] for case in cases]
    for name in PARTS:
        widths = [parts[name] for parts in breakdowns]
        axes.barh(range(len(cases)), widths, left=lefts, label=name.replace("_", " "))
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(cases)), [f"{case['name']}\n{case['document_tokens']} tokens" for case in cases])
    axes.invert_yaxis()
    clock = slowest_breakdown(cases[0])["clock"]
    axes.set_xlabel(f"seconds of a prefill ({clock}, under a profiler; slowest rank)")
    axes.set_title(title(record), wrap=True)
    figure.legend(loc="outside lower center", ncols=len(PARTS))
    figure.savefig(path, dpi=120)
