"""Figures of evaluations, and what all figures share."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apb_ds.config import is_number

logger = logging.getLogger(__name__)

MISSING = "matplotlib is not installed; pip install 'apb_ds[eval]'"
LOG_RANGE = 4  # values of a setting that span a larger factor are drawn on a logarithmic axis
COLOURS = tuple(f"C{number}" for number in range(10))  # matplotlib's own; later lines get another marker
MARKERS = "osD^"
WIDEST_IN_TWO_COLUMNS = 40  # characters of a name in a legend

MeanAndInterval = tuple[float | None, Sequence[float] | None]
NOTHING: MeanAndInterval = (None, None)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes; RuntimeError without matplotlib."""
    if not can_draw():
        raise RuntimeError(f"a figure cannot be drawn: {MISSING}.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Any, axes: Any, title: str, path: Path, *, legend_columns: int | None = None) -> None:
    """Write a figure as PNG, with a legend of its labels below."""
    axes.set_title(title, wrap=True)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        columns = legend_columns or _legend_columns(names)
        figure.legend(loc="outside lower center", ncols=columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def set_lengths_axis(axes: Any, lengths: Sequence[int]) -> None:
    """Have document lengths on a logarithmic axis, and the other axis begin at 0."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}".replace(",", " ") for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("document tokens")


def look_of(number: int) -> dict[str, Any]:
    """Return marker and colour of a figure's line or points, by their number from 0."""
    return {"marker": MARKERS[number // len(COLOURS) % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}


def draw_scores(path: Path, title: str, cells: Sequence[dict[str, Any]]) -> bool:
    """Draw the scores of a summary's cells as PNG; return whether there is a figure now.

    Two labels make a heat map, the first label across; fewer or more make bars. Without matplotlib nothing is drawn
    and the log says so.
    """
    if not can_draw():
        logger.warning("no figure: %s.", MISSING)
        return False
    if not any(cell["score"] is not None for cell in cells):
        return False
    names = list(cells[0]["labels"])
    columns, rows = (_values(cells, name) for name in names) if len(names) == 2 else ([], [])
    figure, axes = new_figure(1.5 + 1.1 * max(len(columns), 4), 1.5 + 0.6 * max(len(rows), 4))
    if len(columns) * len(rows) == len(cells) and len(rows) > 1:
        _draw_map(axes, cells, names, columns, rows)
    else:
        _draw_bars(axes, [cell for cell in cells if cell["score"] is not None])
    save_figure(figure, axes, title, path)
    return True


def _values(cells: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(cell["labels"][name] for cell in cells))


def _draw_map(
    axes: Any, cells: Sequence[dict[str, Any]], names: Sequence[str], columns: Sequence[Any], rows: Sequence[Any]
) -> None:
    table = [[math.nan] * len(columns) for _ in rows]
    for cell in cells:
        column, row = columns.index(cell["labels"][names[0]]), rows.index(cell["labels"][names[1]])
        score = cell["score"]
        table[row][column] = math.nan if score is None else 100 * score
        text = "exact" if score is None and cell["exact"] else "-" if score is None else f"{100 * score:.0f}"
        axes.text(column, row, text, ha="center", va="center")
    axes.imshow(table, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), [str(value) for value in columns])
    axes.set_yticks(range(len(rows)), [str(value) for value in rows])
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])


def _draw_bars(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    scores, errors = _with_errors([(cell["score"], cell["interval"]) for cell in cells], "score")
    axes.barh(range(len(cells)), scores, xerr=errors, color="tab:blue", ecolor="black")
    axes.set_yticks(range(len(cells)), [label_text(cell["labels"]) for cell in cells])
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("score")


def draw_comparison(path: Path, comparison: dict[str, Any]) -> None:
    """Draw each job's mean with its interval, for every cell and over all, as PNG.

    Parameters
    ----------
    comparison : as `compare_results` returns it

    Raises
    ------
    RuntimeError
        Without matplotlib.
    """
    cells, measure = comparison["cells"], comparison["measures"][0]
    jobs = [job["name"] for job in comparison["jobs"]]
    rows_of_legend = math.ceil(len(jobs) / _legend_columns(jobs))
    figure, axes = new_figure(8, 1.5 + 0.2 * (len(cells) + 1) * (len(jobs) + 1) + 0.22 * rows_of_legend)
    for number, job in enumerate(jobs):
        shift = 0.7 * ((number + 0.5) / len(jobs) - 0.5)
        numbers = [mean_and_interval(cell["jobs"][job], measure) if job in cell["jobs"] else NOTHING for cell in cells]
        rows = [row + shift for row, (mean, _) in enumerate(numbers) if mean is not None]
        means, errors = _with_errors(numbers, measure)
        axes.errorbar(means, rows, xerr=errors, **look_of(number), linestyle="none", capsize=3, label=job)
    axes.set_yticks(range(len(cells)), [label_text(cell["labels"]) for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel(measure)
    save_figure(figure, axes, comparison["task"], path)


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
    figure, axes = new_figure(8, 5)
    measure, lines = curves["measure"], curves["lines"]
    values = list(dict.fromkeys(point["value"] for line in lines for point in line["points"]))
    is_numeric = all(map(is_number, values))
    for number, line in enumerate(lines):
        points = [point for point in line["points"] if point["mean"] is not None]
        lefts = [point["value"] if is_numeric else values.index(point["value"]) for point in points]
        means, errors = _with_errors([(point["mean"], point["interval"]) for point in points], measure)
        style = "-" if is_numeric else "none"
        axes.errorbar(lefts, means, yerr=errors, **look_of(number), linestyle=style, capsize=3, label=line["name"])
    for number, level in enumerate((level for level in curves["levels"] if level["mean"] is not None), len(lines)):
        color, scale = look_of(number)["color"], _scale(measure)
        axes.axhline(scale * level["mean"], linestyle="--", color=color, label=level["name"])
        if level["interval"]:
            axes.axhspan(*(scale * end for end in level["interval"]), color=color, alpha=0.15, linewidth=0)
    if not is_numeric:
        axes.set_xticks(range(len(values)), [str(value) for value in values])
    else:
        if min(values) > 0 and max(values) >= LOG_RANGE * min(values):
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xlabel(curves["against"])
    axes.set_ylabel(measure)
    save_figure(figure, axes, curves["task"], path)


def mean_and_interval(numbers: dict[str, Any], measure: str) -> MeanAndInterval:
    """Return a measure's mean and interval from the numbers of a summary or one of its cells."""
    if measure == "score":
        return numbers["score"], numbers["interval"]
    one = numbers["measures"].get(measure)
    return NOTHING if one is None else (one["mean"], one["interval"])


def label_text(labels: dict[str, Any] | None) -> str:
    """Return labels in a few words; no labels mean all samples."""
    return ", ".join(str(value) for value in (labels or {}).values()) or "all"


def _legend_columns(names: Sequence[str]) -> int:
    """Return in how many columns a legend with these names fits below a figure 8 inches wide."""
    return 1 if max(map(len, names), default=0) > WIDEST_IN_TWO_COLUMNS else 2


def _scale(measure: str) -> float:
    return 100.0 if measure == "score" else 1.0


def _with_errors(numbers: Sequence[MeanAndInterval], measure: str) -> tuple[list[float], Any]:
    """Return the means that are known, and the distances to the ends of their intervals, as matplotlib takes them."""
    scale = _scale(measure)
    known = [(mean, interval or (mean, mean)) for mean, interval in numbers if mean is not None]
    below = [scale * (mean - interval[0]) for mean, interval in known]
    above = [scale * (interval[1] - mean) for mean, interval in known]
    return [scale * mean for mean, _ in known], (below, above)
