"""Tables for people: one of a job, one that closes a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 120  # of a file or pipe, which has none of its own
ABSENT = "-"
SCORE_COLUMNS = ("samples", "score", "95% interval", "failed", "exact", "prefill TFLOP")

Record = dict[str, Any]


def make_console(*, to_stderr: bool = False) -> Console:
    """Return a console; its width is the terminal's, or a fixed one where the output goes to a file."""
    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, soft_wrap=False, highlight=False)


def job_table(record: Record) -> Table:
    """Return the table of one finished job; `title` says what ran."""
    metrics = record["metrics"]
    if "cells" in metrics:
        return _score_table(metrics)
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in _rows(record, metrics):
        table.add_row(name, value)
    return table


def _score_table(metrics: Record) -> Table:
    """Return the table of an evaluation: a row for each combination of labels, and one for all."""
    table = Table(box=box.SIMPLE_HEAD)
    names, measures = list(metrics["cells"][0]["labels"]), list(metrics["measures"])
    # Measures fill the line; what they cost is in the summary and in comparisons.
    shown = ("samples", *measures, "failed", "exact") if measures else SCORE_COLUMNS
    for name in (*names, *shown, "prefill s"):
        table.add_column(name.replace("_", " "), justify="right")
    rows = [([str(cell["labels"].get(name, ABSENT)) for name in names], cell) for cell in metrics["cells"]]
    if len(rows) > 1:
        rows.append((["all", *[""] * (len(names) - 1)] if names else [], metrics))
    for labels, numbers in rows:
        cells = _measure_cells(numbers, measures) if measures else _score_cells(numbers)
        table.add_row(*labels, *cells, _prefill_s(numbers))
    return table


def _score_cells(numbers: Record) -> list[str]:
    interval, flops = numbers["interval"], numbers["prefill_flops"]
    return [
        format_count(numbers["samples"]),
        format_percent(numbers["score"]),
        ABSENT if interval is None else f"{format_percent(interval[0])} to {format_percent(interval[1])}",
        format_count(numbers["failed"]),
        format_count(numbers["exact"]),
        format_tflop(flops and flops["total"]),
    ]


def _measure_cells(numbers: Record, measures: Sequence[str]) -> list[str]:
    means = [numbers["measures"].get(name, {"mean": None})["mean"] for name in measures]
    return [
        format_count(numbers["samples"]),
        *(ABSENT if mean is None else f"{mean:.4f}" for mean in means),
        format_count(numbers["failed"]),
        format_count(numbers["exact"]),
    ]


def _prefill_s(numbers: Record) -> str:
    return ABSENT if numbers["prefill_s"] is None else f"{numbers['prefill_s']:.2f}"


def format_percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def title(record: Record) -> str:
    """Return what ran, in a few words."""
    method = record["settings"]["method"]
    model = record["model"]["config"]
    dummy = " (random weights)" if model["path"] and model["load_format"] == "dummy" else ""
    exact = ", exact" if record["exact"] and method["compressor"] else ""  # the exact methods say so by their name
    how = ", ".join(filter(None, (method["method"], method["compressor"])))
    name = model["path"] or record["model"]["source"]
    return f"{name}{dummy}: {how}{exact}"


def _rows(record: Record, metrics: Record) -> list[tuple[str, str]]:
    if "lines" in metrics:
        return _batch_rows(record, metrics)
    lengths = f"{format_count(metrics['document_tokens'])} / {format_count(metrics['query_tokens'])}"
    cut = f"{format_count(metrics['anchor_length'])} / {format_count(metrics['passing_length'])}"
    sent = metrics["bytes_sent"]
    return [
        ("document / query tokens", lengths),
        ("hosts / ranks / rounds", f"{metrics['hosts']} / {metrics['ranks']} / {metrics['rounds']}"),
        ("anchor / passing length", cut if not metrics["exact"] else "exact: every earlier token is passed"),
        *([("turns", format_count(metrics["turns"]))] if "turns" in metrics else []),
        ("prefill", f"{_seconds(metrics['prefill_s'])}, {_rate(metrics['prefill_tokens_per_s'])}"),
        *_flops_rows(metrics),
        ("decode", f"{format_count(metrics['new_tokens'])} tokens, {_rate(metrics['decode_tokens_per_s'])}"),
        ("sent per rank", " / ".join(format_bytes(number) for number in sorted(set(sent), reverse=True))),
        ("peak memory per rank", format_bytes(metrics["peak_memory_bytes"])),
        ("kernels", ", ".join(dict.fromkeys(record["kernels"].values()))),
        ("model loaded in", _seconds(record["model"]["load_s"])),
    ]


def _flops_rows(metrics: Record) -> list[tuple[str, str]]:
    """Return how much a prefill computes; nothing where that is not counted (conversations, other architectures)."""
    flops = metrics.get("prefill_flops")
    if flops is None:
        return []
    total, slowest = (format_tflop(flops[name]) for name in ("total", "slowest_rank"))
    return [("prefill TFLOP, all ranks / slowest", f"{total} / {slowest}")]


def _batch_rows(record: Record, metrics: Record) -> list[tuple[str, str]]:
    done = [f"{format_count(metrics['answered'])} of {format_count(metrics['lines'])}"]
    if metrics["resumed"]:
        done.append(f"{format_count(metrics['resumed'])} before")
    if metrics["failed"]:
        done.append(f"{format_count(metrics['failed'])} failed")
    exact = f", {format_count(metrics['exact_prefills'])} of them exact" if metrics["exact_prefills"] else ""
    return [
        ("answered", ", ".join(done)),
        (
            "documents prefilled",
            f"{format_count(metrics['prefills'])}, {format_count(metrics['document_tokens'])} tokens{exact}",
        ),
        ("hosts / ranks", f"{metrics['hosts'] or ABSENT} / {metrics['ranks']}"),
        ("prefill", f"{_seconds(metrics['prefill_s'])}, {_rate(metrics['prefill_tokens_per_s'])}"),
        ("decode", f"{format_count(metrics['new_tokens'])} tokens, {_rate(metrics['decode_tokens_per_s'])}"),
        ("all together", _seconds(metrics["seconds"])),
        ("peak memory per rank", format_bytes(metrics["peak_memory_bytes"])),
        ("kernels", ", ".join(dict.fromkeys(record["kernels"].values())) or ABSENT),
    ]


def failure_lines(records: Sequence[Record]) -> list[str]:
    """Return which jobs of a sweep failed, and why."""
    swept = swept_names(records)
    lines = []
    for number, record in enumerate(records):
        if record["status"] == "ok":
            continue
        asked = ", ".join(f"{name}={record['overrides'][name]}" for name in swept if name in record["overrides"])
        lines.append(f"Job {number}{f' ({asked})' if asked else ''} failed: {record['error']}")
    return lines


def sweep_table(records: Sequence[Record]) -> Table:
    """Return the table that closes a sweep: what was swept, the numbers that matter, and how each job ended."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    swept = swept_names(records)
    table.add_column("job", justify="right")
    for name in short_names(swept):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (
        "l_a",
        "l_p",
        "rounds",
        "prefill s",
        "tokens/s",
        "decode tokens/s",
        "sent",
        "peak",
        "answer",
        "status",
    ):
        left = name in ("answer", "status")
        table.add_column(name, justify="left" if left else "right", no_wrap=name in ("sent", "peak"))
    for number, record in enumerate(records):
        overridden = [str(record["overrides"].get(name, ABSENT)) for name in swept]
        table.add_row(str(number), *overridden, *_sweep_cells(record))
    return table


def swept_names(records: Sequence[Record]) -> list[str]:
    """Return the overrides that differ between the jobs, in the order of the command line; all of them for one job."""
    names = list(dict.fromkeys(name for record in records for name in record["overrides"]))
    if len(records) == 1:
        return names
    return [name for name in names if len({str(record["overrides"].get(name)) for record in records}) > 1]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each config path, or all of it where two would look alike."""
    last = [path.rpartition(".")[2] for path in paths]
    return [short if last.count(short) == 1 else path for short, path in zip(last, paths, strict=True)]


def _sweep_cells(record: Record) -> list[str]:
    if "metrics" not in record:
        return [ABSENT] * 9 + [record["status"]]
    metrics = record["metrics"]
    if "cells" in metrics:
        numbers = [ABSENT] * 9
        numbers[3], numbers[7] = _prefill_s(metrics), format_bytes(metrics["peak_memory_bytes"])
        answer = format_percent(metrics["score"])
        if metrics["measures"]:
            name, first = next(iter(metrics["measures"].items()))
            answer = f"{name} {ABSENT if first['mean'] is None else format(first['mean'], '.4f')}"
        return [*numbers[:-1], answer, record["status"]]
    correct = record["task"]["correct"]
    answer = ABSENT if correct is None else ("right" if correct else "wrong")
    if "lines" in metrics:
        answer = f"{format_count(metrics['answered'] + metrics['resumed'])}/{format_count(metrics['lines'])}"
    shape = [ABSENT] * 3  # differs from document to document
    if "rounds" in metrics:
        shape = [
            format_count(metrics["anchor_length"]),
            format_count(metrics["passing_length"]),
            str(metrics["rounds"]),
        ]
    return [
        *shape,
        f"{metrics['prefill_s']:.2f}",
        format_number(metrics["prefill_tokens_per_s"]),
        format_number(metrics["decode_tokens_per_s"]),
        format_bytes(max(metrics["bytes_sent"])),
        format_bytes(metrics["peak_memory_bytes"]),
        answer,
        "exact" if metrics.get("exact") and record["status"] == "ok" else record["status"],
    ]


def format_bytes(number: int) -> str:
    """Return a byte count in the unit that keeps it short."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def format_tflop(number: float | None) -> str:
    """Return operations in units of 10**12, to three digits."""
    if number is None:
        return ABSENT
    tera = number / 1e12
    return f"{tera:,.0f}".replace(",", " ") if tera >= 1000 else f"{tera:.3g}"


def format_count(number: int) -> str:
    """Return an integer with its thousands apart."""
    return f"{number:,}".replace(",", " ")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def format_number(value: float | None) -> str:
    """Return a number to about three digits."""
    if value is None:
        return ABSENT
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}".replace(",", " ")


def _rate(value: float | None) -> str:
    return ABSENT if value is None else f"{format_number(value)} tokens/s"
