"""Figures: of an evaluation a heat map over two labels, or bars; of several what is compared, and curves."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EXTRA = "eval"
LOG_RANGE = 4  # values of a setting that span more are drawn on a logarithmic axis
COLOURS = tuple(f"C{number}" for number in range(10))  # matplotlib's; what comes after that has another marker
MARKERS = "osD^"
WIDEST_IN_TWO_COLUMNS = 40  # characters of a name in a legend

MeanAndInterval = tuple[float | None, Sequence[float] | None]
NOTHING: MeanAndInterval = (None, None)


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
    cells, measure = comparison["cells"], comparison["measures"][0]
    jobs = [job["name"] for job in comparison["jobs"]]
    rows_of_legend = math.ceil(len(jobs) / legend_columns(jobs))
    figure = _new_figure(8, 1.5 + 0.2 * (len(cells) + 1) * (len(jobs) + 1) + 0.22 * rows_of_legend)
    axes = figure.subplots()
    for number, job in enumerate(jobs):
        shift = 0.7 * ((number + 0.5) / len(jobs) - 0.5)
        numbers = [mean_and_interval(cell["jobs"][job], measure) if job in cell["jobs"] else NOTHING for cell in cells]
        rows = [row + shift for row, (mean, _) in enumerate(numbers) if mean is not None]
        means, errors = _with_errors(numbers, measure)
        axes.errorbar(means, rows, xerr=errors, **look_of(number), linestyle="none", capsize=3, label=job)
    axes.set_yticks(range(len(cells)), [label_text(cell["labels"]) for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel(measure)
    _finish(figure, axes, comparison["task"], path)


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
    measure, lines = curves["measure"], curves["lines"]
    values = list(dict.fromkeys(point["value"] for line in lines for point in line["points"]))
    is_numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    for number, line in enumerate(lines):
        points = [point for point in line["points"] if point["mean"] is not None]
        places = [point["value"] if is_numeric else values.index(point["value"]) for point in points]
        means, errors = _with_errors([(point["mean"], point["interval"]) for point in points], measure)
        style = "-" if is_numeric else "none"
        axes.errorbar(places, means, yerr=errors, **look_of(number), linestyle=style, capsize=3, label=line["name"])
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
    _finish(figure, axes, curves["task"], path)


def mean_and_interval(numbers: dict[str, Any], measure: str) -> MeanAndInterval:
    """Return a measure's mean and interval from the numbers of a summary or one of its cells."""
    if measure == "score":
        return numbers["score"], numbers["interval"]
    one = numbers["measures"].get(measure)
    return NOTHING if one is None else (one["mean"], one["interval"])


def label_text(labels: dict[str, Any] | None) -> str:
    """Return labels in a few words; None and no labels are all samples."""
    return ", ".join(str(value) for value in (labels or {}).values()) or "all"


def _new_figure(width: float, height: float) -> Any:
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"a figure needs matplotlib, which is not installed: pip install 'apb_ds[{EXTRA}]'.")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=legend_columns(axes.get_legend_handles_labels()[1]))
    figure.savefig(path, dpi=120)


def look_of(number: int) -> dict[str, Any]:
    """Return marker and colour of a figure's line or points, by their number from 0."""
    return {"marker": MARKERS[number // len(COLOURS) % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}


def legend_columns(names: Sequence[str]) -> int:
    """Return in how many columns a legend of such names fits below a figure 8 inches wide."""
    return 1 if max(map(len, names), default=0) > WIDEST_IN_TWO_COLUMNS else 2


def _scale(measure: str) -> float:
    return 100.0 if measure == "score" else 1.0


def _with_errors(numbers: Sequence[MeanAndInterval], measure: str) -> tuple[list[float], Any]:
    """Return the means that there are, and the distances to their intervals' ends as matplotlib takes them."""
    scale = _scale(measure)
    known = [(mean, interval or (mean, mean)) for mean, interval in numbers if mean is not None]
    below = [scale * (mean - interval[0]) for mean, interval in known]
    above = [scale * (interval[1] - mean) for mean, interval in known]
    return [scale * mean for mean, _ in known], (below, above)
