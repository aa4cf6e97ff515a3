"""Figures of a benchmark: speed over documents and over queries at once, and where a prefill's time goes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from apb_ds.ops.profiling import PARTS
from apb_ds.report.bench_table import EMULATED, slowest_breakdown, title
from apb_ds.report.figures import MISSING, can_draw, look_of, new_figure, save_figure, set_lengths_axis

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def draw_bench(directory: Path, record: Record) -> list[Path]:
    """Draw speed.png, and sequences.png and breakdown.png if the record has such; return the figures drawn.

    Without matplotlib nothing is drawn and the log says so.
    """
    if not can_draw():
        logger.warning("no figure: %s.", MISSING)
        return []
    cases = [case for case in record["cases"] if case["status"] == "ok"]
    drawn = {
        directory / "speed.png": (_draw_speed, cases),
        directory / "sequences.png": (_draw_sequences, [case for case in cases if case.get("sequences")]),
        directory / "breakdown.png": (_draw_breakdown, [case for case in cases if case["breakdown"]]),
    }
    for path, (draw, shown) in drawn.items():
        if shown:
            draw(path, record, shown)
    return [path for path, (_, shown) in drawn.items() if shown]


def _draw_speed(path: Path, record: Record, cases: list[Record]) -> None:
    """Draw each method's tokens per second over the document's length, with the slowest and the fastest run."""
    figure, axes = new_figure(8, 5)
    for number, name in enumerate(dict.fromkeys(case["name"] for case in cases)):
        of_name = [case for case in cases if case["name"] == name]
        lengths = [case["document_tokens"] for case in of_name]
        slowest, speeds, fastest = (
            [case["document_tokens"] / case["prefill"][key] for case in of_name]
            for key in ("max_s", "median_s", "min_s")
        )
        below = [speed - low for speed, low in zip(speeds, slowest, strict=True)]
        above = [high - speed for speed, high in zip(speeds, fastest, strict=True)]
        style = "--" if of_name[0]["emulated"] else "-"
        axes.errorbar(lengths, speeds, yerr=(below, above), **look_of(number), linestyle=style, capsize=3, label=name)
    set_lengths_axis(axes, sorted({case["document_tokens"] for case in cases}))
    note = f"\n({EMULATED}: the slowest rank's computation)" if record["emulated"] else ""
    axes.set_ylabel(f"prefill, tokens per second{note}")
    save_figure(figure, axes, title(record), path)


def _draw_sequences(path: Path, record: Record, cases: list[Record]) -> None:
    """Draw tokens per second over the number of queries, together and one by one, with slowest and fastest rounds."""
    figure, axes = new_figure(8, 5)
    sizes = [found["sequences"] for found in cases[0]["sequences"]]
    for number, case in enumerate(cases):
        name = f"{case['name']}, {case['document_tokens']} tokens"
        for way, style in (("together", "-"), ("one_by_one", ":")):
            slowest, speeds, fastest = (
                [found["sequences"] * found["new_tokens"] / found[way]["answers"][key] for found in case["sequences"]]
                for key in ("max_s", "median_s", "min_s")
            )
            below = [speed - low for speed, low in zip(speeds, slowest, strict=True)]
            above = [high - speed for speed, high in zip(speeds, fastest, strict=True)]
            label = f"{name}: {way.replace('_', ' ')}"
            axes.errorbar(
                sizes, speeds, yerr=(below, above), **look_of(number), linestyle=style, capsize=3, label=label
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("queries about one document")
    axes.set_ylabel("new tokens per second, queries included")
    save_figure(figure, axes, title(record), path)


def _draw_breakdown(path: Path, record: Record, cases: list[Record]) -> None:
    """Draw a bar for each case, made of the seconds of its parts."""
    figure, axes = new_figure(9, 2 + 0.5 * len(cases))
    lefts = [0.0] * len(cases)
    breakdowns = [slowest_breakdown(case) for case in cases]
    for name in PARTS:
        widths = [breakdown["parts_s"][name] for breakdown in breakdowns]
        axes.barh(range(len(cases)), widths, left=lefts, label=name.replace("_", " "))
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(cases)), [f"{case['name']}\n{case['document_tokens']} tokens" for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds of a prefill ({breakdowns[0]['clock']}, under a profiler; slowest rank)")
    save_figure(figure, axes, title(record), path, legend_columns=len(PARTS))
