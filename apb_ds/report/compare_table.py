"""Tables of evaluations side by side: means, paired differences, ratios of divergences, and means along a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from apb_ds.report.figures import label_text, mean_and_interval
from apb_ds.report.table import ABSENT, format_tflop

MAX_PAIR_ROWS = 40  # with more, only what is over all labels is shown; the JSON has everything


def comparison_tables(comparison: dict[str, Any]) -> list[Table]:
    """Return the tables of what `compare_results` returns."""
    tables = [_mean_table(comparison), _pair_table(comparison)]
    if comparison["ratios"]:
        tables.append(_ratio_table(comparison["ratios"]))
    return tables


def curve_table(curves: dict[str, Any]) -> Table:
    """Return the table of what `gather_curves` returns: a row for each value."""
    measure = curves["measure"]
    columns = ("job", curves["against"], measure, "95% interval", "samples", "prefill TFLOP", "prefill s")
    table = _new_table(f"{curves['task']}: {measure} against {curves['against']}", columns, left=("job",))
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
            ABSENT if point["prefill_s"] is None else f"{point['prefill_s']:.2f}",
        )
    return table


def _mean_table(comparison: dict[str, Any]) -> Table:
    """Return means by labels, a column for each job, and below them what a prefill costs."""
    measure, jobs = comparison["measures"][0], [job["name"] for job in comparison["jobs"]]
    cells = comparison["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["labels"] or ()))
    table = _new_table(f"{comparison['task']}: {measure}", (*(names or [""]), *jobs), left=names or ("",))
    for cell in cells if names else cells[-1:]:
        labels = cell["labels"]
        head = ["all", *[""] * (len(names) - 1)] if labels is None else [str(labels.get(name, "")) for name in names]
        means = [mean_and_interval(cell["jobs"][job], measure)[0] if job in cell["jobs"] else None for job in jobs]
        table.add_row(*head, *(_number(mean, measure) for mean in means), end_section=cell is cells[-2])
    flops = [job.get("prefill_flops") for job in comparison["jobs"]]
    fill = [""] * max(0, len(names) - 1)
    if any(flops):
        table.add_row("prefill TFLOP", *fill, *(format_tflop(one and one["total"]) for one in flops))
    seconds = [job["prefill_s"] for job in comparison["jobs"]]
    table.add_row("prefill s", *fill, *(ABSENT if one is None else f"{one:.2f}" for one in seconds))
    return table


def _pair_table(comparison: dict[str, Any]) -> Table:
    """Return the paired differences to the baseline, and how many samples are not in them."""
    pairs = comparison["pairs"]
    measures = comparison["measures"]
    if len(measures) > 1 or len(pairs) > MAX_PAIR_ROWS or not any(pair["labels"] for pair in pairs):
        pairs = [pair for pair in pairs if pair["labels"] is None]
    what = "measure" if len(measures) > 1 else "of"
    columns = ["job", what, "paired", "difference", "95% interval", "failed", "exact", "unpaired"]
    title = f"difference to {comparison['baseline']}, over the samples that both answered"
    table = _new_table(title, columns, left=("job", what))
    last = ""
    for pair in pairs:
        if pair["job"] != last:
            table.add_section()
        counts = [str(pair[name]) for name in ("failed", "exact", "unpaired")]
        measure = pair["measure"]
        table.add_row(
            "" if pair["job"] == last else pair["job"],
            measure if len(measures) > 1 else label_text(pair["labels"]),
            str(pair["samples"]),
            _number(pair["difference"], measure, signed=True),
            _interval(pair["interval"], measure, signed=True),
            *counts,
        )
        last = pair["job"]
    return table


def _ratio_table(ratios: Sequence[dict[str, Any]]) -> Table:
    """Return ratios of divergences: a row for each combination of labels, a column for each job."""
    table = _new_table(
        f"{ratios[0]['measure']} over that of {ratios[0]['reference']}",
        ("of", *(ratio["job"] for ratio in ratios)),
        left=("of",),
    )
    by_labels: dict[str, list[str]] = {}
    for place, ratio in enumerate(ratios):
        for cell in ratio["cells"]:
            row = by_labels.setdefault(label_text(cell["labels"]), [ABSENT] * len(ratios))
            row[place] = _ratio(cell["ratio"])
    for name, row in by_labels.items():
        table.add_row(name, *row)
    table.add_section()
    table.add_row("largest", *(_ratio(ratio["largest"]) for ratio in ratios))
    overall = []
    for ratio in ratios:
        interval = ratio["interval"]
        overall.append(_ratio(ratio["ratio"]) + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""))
    table.add_row("of means (95% interval)", *overall)
    table.add_row("texts", *(str(ratio["samples"]) for ratio in ratios))
    return table


def _new_table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def _number(value: float | None, measure: str, *, signed: bool = False) -> str:
    """Return a score in percent, or in points where signed; any other measure as it is."""
    if value is None:
        return ABSENT
    plus = "+" if signed else ""
    return f"{100 * value:{plus}.1f}" if measure == "score" else f"{value:{plus}.4f}"


def _interval(interval: Sequence[float] | None, measure: str, *, signed: bool = False) -> str:
    if interval is None:
        return ABSENT
    low, high = (_number(end, measure, signed=signed) for end in interval)
    return f"{low} to {high}"


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"
