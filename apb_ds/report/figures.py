"""Figures: of an evaluation a heat map over two labels, or bars; of several what is compared, and curves."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EXTRA = "eval"


def draw_scores(path: Path, title: str, cells: Sequence[dict[str, Any]]) -> bool:
    """Draw the scores of a summary's cells as PNG; return whether there is a figure now.

    Two labels make a heat map, the first label across; fewer or more make bars. Without matplotlib nothing is drawn,
    and the log says so.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no figure: matplotlib is not installed (pip install 'apb_ds[%s]').", EXTRA)
        return False
    if not any(cell["score"] is not None for cell in cells):
        return False
    from matplotlib.figure import Figure

    names = list(cells[0]["labels"])
    columns, rows = (_values(cells, name) for name in names) if len(names) == 2 else ([], [])
    is_map = len(names) == 2 and len(columns) * len(rows) == len(cells) and len(rows) > 1
    figure = Figure(figsize=(1.5 + 1.1 * max(len(columns), 4), 1.5 + 0.6 * max(len(rows), 4)), layout="constrained")
    axes = figure.subplots()
    if is_map:
        _draw_map(axes, cells, names, columns, rows)
    else:
        _draw_bars(axes, cells)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    return True


def _values(cells: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(cell["labels"][name] for cell in cells))


def _draw_map(
    axes: Any, cells: Sequence[dict[str, Any]], names: Sequence[str], columns: Sequence[Any], rows: Sequence[Any]
) -> None:
    table: list[list[float]] = [[float("nan")] * len(columns) for _ in rows]
    for cell in cells:
        column, row = columns.index(cell["labels"][names[0]]), rows.index(cell["labels"][names[1]])
        score = cell["score"]
        table[row][column] = float("nan") if score is None else 100 * score
        text = "exact" if score is None and cell["exact"] else "-" if score is None else f"{100 * score:.0f}"
        axes.text(column, row, text, ha="center", va="center")
    axes.imshow(table, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), [str(value) for value in columns])
    axes.set_yticks(range(len(rows)), [str(value) for value in rows])
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])


def _draw_bars(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    shown = [cell for cell in cells if cell["score"] is not None]
    names = [", ".join(str(value) for value in cell["labels"].values()) or "all" for cell in shown]
    scores = [100 * cell["score"] for cell in shown]
    errors = [
        (score - 100 * cell["interval"][0], 100 * cell["interval"][1] - score) if cell["interval"] else (0.0, 0.0)
        for score, cell in zip(scores, shown, strict=True)
    ]
    axes.barh(range(len(shown)), scores, xerr=list(zip(*errors, strict=True)), color="tab:blue", ecolor="black")
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("score")


def draw_comparison(path: Path, comparison: dict[str, Any]) -> None:
    """Draw each job's mean with its interval for every cell and over all, as PNG.

    Parameters
    ----------
    comparison : as `compare_results` returns it

    Raises
    ------
    RuntimeError
        Without matplotlib.
    """
    figure = _new_figure(8, 1.5 + 0.25 * len(comparison["cells"]) * (len(comparison["jobs"]) + 1))
    axes = figure.subplots()
    measure, jobs = comparison["measures"][0], [job["name"] for job in comparison["jobs"]]
    for number, job in enumerate(jobs):
        points = [
            (row + 0.7 * (number + 0.5) / len(jobs) - 0.35, *numbers)
            for row, cell in enumerate(comparison["cells"])
            if job in cell["jobs"] and (numbers := mean_and_interval(cell["jobs"][job], measure))[0] is not None
        ]
        rows, means, intervals = zip(*points, strict=True) if points else ((), (), ())
        errors = _errors(means, intervals)
        axes.errorbar(means, rows, xerr=errors, fmt="o", capsize=3, label=job)
    names = [label_text(cell["labels"]) for cell in comparison["cells"]]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(measure)
    axes.legend()
    axes.set_title(comparison["task"])
    figure.savefig(path, dpi=120)


def draw_curves(path: Path, curves: dict[str, Any]) -> None:
    """Draw means along a setting, with intervals, as PNG; evaluations without the setting are level lines.

    Parameters
    ----------
    curves : as `gather_curves` returns it

    Raises
    ------
    RuntimeError
        Without matplotlib.
    """
    figure = _new_figure(8, 5)
    axes = figure.subplots()
    values = [point["value"] for line in curves["lines"] for point in line["points"]]
    is_numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    for line in curves["lines"]:
        points = [point for point in line["points"] if point["mean"] is not None]
        places = [point["value"] if is_numeric else str(point["value"]) for point in points]
        means = [point["mean"] for point in points]
        errors = _errors(means, [point["interval"] for point in points])
        axes.errorbar(places, means, yerr=errors, fmt="o-", capsize=3, label=line["name"])
    for number, level in enumerate(level for level in curves["levels"] if level["mean"] is not None):
        axes.axhline(level["mean"], linestyle="--", color=f"C{len(curves['lines']) + number}", label=level["name"])
    if is_numeric:
        if min(values) > 0 and max(values) >= 8 * min(values):
            axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))], minor=False)
    axes.set_xlabel(curves["against"])
    axes.set_ylabel(curves["measure"])
    axes.legend()
    axes.set_title(curves["task"])
    figure.savefig(path, dpi=120)


def mean_and_interval(numbers: dict[str, Any], measure: str) -> tuple[float | None, Any]:
    """Return a measure's mean and interval from the numbers of a summary or one of its cells."""
    if measure == "score":
        return numbers["score"], numbers["interval"]
    one = numbers["measures"].get(measure, {"mean": None, "interval": None})
    return one["mean"], one["interval"]


def label_text(labels: dict[str, Any] | None) -> str:
    """Return labels in a few words; None and no labels are all samples."""
    return ", ".join(str(value) for value in (labels or {}).values()) or "all"


def _new_figure(width: float, height: float) -> Any:
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"a figure needs matplotlib, which is not installed: pip install 'apb_ds[{EXTRA}]'.")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _errors(means: Sequence[float], intervals: Sequence[Any]) -> list[tuple[float, ...]] | None:
    """Return distances to the intervals' ends, below and above, as matplotlib takes them."""
    pairs = [
        (mean - interval[0], interval[1] - mean) if interval else (0.0, 0.0)
        for mean, interval in zip(means, intervals, strict=True)
    ]
    return list(zip(*pairs, strict=True)) if pairs else None
