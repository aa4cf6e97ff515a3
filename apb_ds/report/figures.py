"""Figures of an evaluation: a heat map over two labels, bars otherwise."""

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
