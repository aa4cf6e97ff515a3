"""Tables of several evaluations: means, paired differences, ratios of divergences, and means along a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apb_ds.report.figures import label_text, mean_and_interval
from apb_ds.report.fitting import ABSENT, Column, FittedTable
from apb_ds.report.formats import format_tflop
from apb_ds.report.table import format_prefill

MAX_PAIR_ROWS = 40  # beyond that only the differences over all labels are shown; the JSON has everything


def comparison_tables(comparison: dict[str, Any]) -> list[FittedTable]:
    """Return the tables of what `compare_results` returns."""
    tables = [_mean_table(comparison), _pair_table(comparison)]
    return [*tables, _ratio_table(comparison["ratios"])] if comparison["ratios"] else tables


def curve_table(curves: dict[str, Any]) -> FittedTable:
    """Return the table of what `gather_curves` returns: a row for each value."""
    measure = curves["measure"]
    columns = [
        Column("job", is_text=True),
        Column(curves["against"]),
        Column(measure),
        Column("95% interval", is_text=True, drop=1),
        Column("samples", drop=2),
        Column("prefill TFLOP", drop=4),
        Column("prefill s", drop=3),
    ]
    table = FittedTable(columns, title=f"{curves['task']}: {measure} against {curves['against']}")
    points = [(line["name"], point) for line in curves["lines"] for point in line["points"]]
    for name, point in [*points, *((level["name"], level) for level in curves["levels"])]:
        flops = point["prefill_flops"]
        table.add_row(
            name,
            ABSENT if point["value"] is None else str(point["value"]),
            _number(point["mean"], measure),
            _interval(point["interval"], measure),
            str(point["samples"]),
            format_tflop(flops and flops["total"]),
            format_prefill(point["prefill_s"]),
        )
    return table


def _job_table(title: str, labels: Sequence[str], jobs: Sequence[str]) -> FittedTable:
    """Return a table with a column for each job, continued below where they do not fit."""
    columns = [*(Column(name, is_text=True) for name in labels), *(Column(job, drop=1) for job in jobs)]
    return FittedTable(columns, title=title, split=True, keep_empty=True)


def _mean_table(comparison: dict[str, Any]) -> FittedTable:
    """Return means by labels, and below them the cost of a prefill."""
    measure, jobs = comparison["measures"][0], comparison["jobs"]
    cells = comparison["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["labels"] or ()))
    table = _job_table(f"{comparison['task']}: {measure}", names or [""], [job["name"] for job in jobs])
    for cell in cells if names else cells[-1:]:
        labels = cell["labels"]
        if labels is None and names:
            table.add_section()
        head = _head("all", names) if labels is None else [str(labels.get(name, "")) for name in names]
        found = [cell["jobs"].get(job["name"]) for job in jobs]
        table.add_row(*head, *(_number(one and mean_and_interval(one, measure)[0], measure) for one in found))
    flops = [job.get("prefill_flops") for job in jobs]
    if any(flops):
        table.add_row(*_head("prefill TFLOP", names), *(format_tflop(one and one["total"]) for one in flops))
    table.add_row(*_head("prefill s", names), *(format_prefill(job["prefill_s"]) for job in jobs))
    return table


def _head(text: str, names: Sequence[str]) -> list[str]:
    return [text, *[""] * (len(names) - 1)]


def _pair_table(comparison: dict[str, Any]) -> FittedTable:
    """Return the paired differences to the baseline, and how many samples are left out of them."""
    pairs, measures = comparison["pairs"], comparison["measures"]
    if len(measures) > 1 or len(pairs) > MAX_PAIR_ROWS or not any(pair["labels"] for pair in pairs):
        pairs = [pair for pair in pairs if pair["labels"] is None]
    columns = [
        Column("job", is_text=True),
        Column("measure" if len(measures) > 1 else "labels", is_text=True),
        Column("paired", drop=2),
        Column("difference"),
        Column("95% interval", is_text=True, drop=1),
        Column("failed", drop=4),
        Column("exact", drop=3),
        Column("unpaired", drop=5),
    ]
    title = f"difference to {comparison['baseline']}, over the samples that both answered"
    table = FittedTable(columns, title=title)
    last = None
    for pair in pairs:
        measure, is_next = pair["measure"], pair["job"] != last
        if is_next and last is not None:
            table.add_section()
        last = pair["job"]
        table.add_row(
            pair["job"] if is_next else "",
            measure if len(measures) > 1 else label_text(pair["labels"]),
            str(pair["samples"]),
            _number(pair["difference"], measure, signed=True),
            _interval(pair["interval"], measure, signed=True),
            *(str(pair[name]) for name in ("failed", "exact", "unpaired")),
        )
    return table


def _ratio_table(ratios: Sequence[dict[str, Any]]) -> FittedTable:
    """Return ratios of divergences: a row for each combination of labels, a column for each job."""
    title = f"{ratios[0]['measure']} over that of {ratios[0]['reference']}"
    table = _job_table(title, ["labels"], [ratio["job"] for ratio in ratios])
    by_labels: dict[str, list[str]] = {}
    for index, ratio in enumerate(ratios):
        for cell in ratio["cells"]:
            row = by_labels.setdefault(label_text(cell["labels"]), [ABSENT] * len(ratios))
            row[index] = _ratio(cell["ratio"])
    for name, row in by_labels.items():
        table.add_row(name, *row)
    table.add_section()
    table.add_row("largest", *(_ratio(ratio["largest"]) for ratio in ratios))
    table.add_row("of means", *(_ratio(ratio["ratio"]) for ratio in ratios))
    intervals = (ratio["interval"] for ratio in ratios)
    table.add_row("95% interval", *(" to ".join(map(_ratio, ends)) if ends else ABSENT for ends in intervals))
    table.add_row("texts", *(str(ratio["samples"]) for ratio in ratios))
    return table


def _number(value: float | None, measure: str, *, signed: bool = False) -> str:
    """Return a score in percent, a difference of scores in points, and any other measure as it is."""
    if value is None:
        return ABSENT
    plus = "+" if signed else ""
    return f"{100 * value:{plus}.1f}" if measure == "score" else f"{value:{plus}.4f}"


def _interval(interval: Sequence[float] | None, measure: str, *, signed: bool = False) -> str:
    return " to ".join(_number(end, measure, signed=signed) for end in interval) if interval else ABSENT


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"
