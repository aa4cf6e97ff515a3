"""The tables of one job and of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from apb_ds.report.fitting import ABSENT, Column, FittedTable
from apb_ds.report.formats import format_bytes, format_count, format_number, format_percent, format_rate, format_tflop

PLAIN_WIDTH = 120  # of a file or pipe

Record = dict[str, Any]
Rows = list[tuple[str, str]]


def make_console(*, to_stderr: bool = False) -> Console:
    """Return a console as wide as the terminal, or `PLAIN_WIDTH` where the output goes to a file."""
    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, soft_wrap=False, highlight=False)


def title(record: Record) -> str:
    """Return in a few words what ran."""
    method = record["settings"]["method"]
    model = record["model"]["config"]
    dummy = " (random weights)" if model["path"] and model["load_format"] == "dummy" else ""
    exact = ", exact" if record["exact"] and method["compressor"] else ""  # an exact method's name says so already
    how = ", ".join(filter(None, (method["method"], method["compressor"])))
    return f"{model['path'] or record['model']['source']}{dummy}: {how}{exact}"


def job_table(record: Record) -> FittedTable:
    """Return the table of one finished job; `title` says what ran."""
    metrics = record["metrics"]
    if "cells" in metrics:
        return _score_table(metrics)
    table = FittedTable([Column("", is_text=True), Column("", is_text=True)], show_header=False)
    for row in _batch_rows(record, metrics) if "lines" in metrics else _question_rows(record, metrics):
        table.add_row(*row)
    return table


def _score_table(metrics: Record) -> FittedTable:
    """Return the table of an evaluation: a row for each combination of labels, and one for all."""
    names, measures = list(metrics["cells"][0]["labels"]), list(metrics["measures"])
    columns = [Column(name.replace("_", " ")) for name in names]
    columns.append(Column("samples", drop=20))
    columns += [Column(name.replace("_", " "), drop=number) for number, name in enumerate(measures)]
    if not measures:
        columns += [Column("score"), Column("95% interval", is_text=True, drop=1)]
    columns += [Column("failed", drop=21), Column("exact", drop=22)]
    columns += [Column("prefill TFLOP", drop=24)] if not measures else []  # else in the summary and in comparisons
    table = FittedTable([*columns, Column("prefill s", drop=23)])
    rows = [([str(cell["labels"].get(name, ABSENT)) for name in names], cell) for cell in metrics["cells"]]
    if len(rows) > 1:
        rows.append((["all", *[""] * (len(names) - 1)] if names else [], metrics))
    for labels, numbers in rows:
        interval, flops = numbers["interval"], numbers["prefill_flops"]
        cells = [format_count(numbers["samples"])]
        if measures:
            means = (numbers["measures"].get(name, {"mean": None})["mean"] for name in measures)
            cells += [ABSENT if mean is None else f"{mean:.4f}" for mean in means]
        else:
            cells.append(format_percent(numbers["score"]))
            cells.append(" to ".join(map(format_percent, interval)) if interval else ABSENT)
        cells += [format_count(numbers["failed"]), format_count(numbers["exact"])]
        cells += [] if measures else [format_tflop(flops and flops["total"])]
        table.add_row(*labels, *cells, format_prefill(numbers["prefill_s"]))
    return table


def _question_rows(record: Record, metrics: Record) -> Rows:
    lengths = f"{format_count(metrics['document_tokens'])} / {format_count(metrics['query_tokens'])}"
    cut = f"{format_count(metrics['anchor_length'])} / {format_count(metrics['passing_length'])}"
    flops = metrics.get("prefill_flops")  # not counted for conversations and some architectures
    rows = [
        ("document / query tokens", lengths),
        ("hosts / ranks / rounds", f"{metrics['hosts']} / {metrics['ranks']} / {metrics['rounds']}"),
        *([("stages, of so many ranks", str(metrics["stages"]))] if metrics.get("stages", 1) > 1 else []),
        ("anchor / passing length", "exact: every earlier token is passed" if metrics["exact"] else cut),
    ]
    if "turns" in metrics:
        rows.append(("turns", format_count(metrics["turns"])))
    rows.append(("prefill", f"{metrics['prefill_s']:.2f} s, {format_rate(metrics['prefill_tokens_per_s'])}"))
    if flops:
        counts = f"{format_tflop(flops['total'])} / {format_tflop(flops['slowest_rank'])}"
        rows.append(("prefill TFLOP, all ranks / slowest", counts))
    sent = sorted(set(metrics["bytes_sent"]), reverse=True)
    return [
        *rows,
        _decode_row(metrics),
        ("sent per rank", " / ".join(map(format_bytes, sent))),
        *_closing_rows(record, metrics),
        ("model loaded in", f"{record['model']['load_s']:.2f} s"),
    ]


def _batch_rows(record: Record, metrics: Record) -> Rows:
    done = [f"{format_count(metrics['answered'])} of {format_count(metrics['lines'])}"]
    done += [f"{format_count(metrics['resumed'])} before"] if metrics["resumed"] else []
    done += [f"{format_count(metrics['failed'])} failed"] if metrics["failed"] else []
    prefilled = [format_count(metrics["prefills"]), f"{format_count(metrics['document_tokens'])} tokens"]
    prefilled += [f"{format_count(metrics['exact_prefills'])} of them exact"] if metrics["exact_prefills"] else []
    return [
        ("answered", ", ".join(done)),
        ("documents prefilled", ", ".join(prefilled)),
        ("hosts / ranks", f"{metrics['hosts'] or ABSENT} / {metrics['ranks']}"),
        ("prefill", f"{metrics['prefill_s']:.2f} s, {format_rate(metrics['prefill_tokens_per_s'])}"),
        _decode_row(metrics),
        ("total time", f"{metrics['seconds']:.2f} s"),
        *_closing_rows(record, metrics),
    ]


def _decode_row(metrics: Record) -> tuple[str, str]:
    return "decode", f"{format_count(metrics['new_tokens'])} tokens, {format_rate(metrics['decode_tokens_per_s'])}"


def _closing_rows(record: Record, metrics: Record) -> Rows:
    return [
        ("peak memory per rank", format_bytes(metrics["peak_memory_bytes"])),
        ("kernels", ", ".join(dict.fromkeys(record["kernels"].values())) or ABSENT),
    ]


def format_prefill(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{seconds:.2f}"


def sweep_table(records: Sequence[Record]) -> FittedTable:
    """Return the table that closes a sweep: what was swept, the main numbers, and how each job ended."""
    swept = swept_names(records)
    numbers = {
        "l_a": 8,
        "l_p": 9,
        "rounds": 7,
        "prefill s": 1,
        "tokens/s": 3,
        "decode tokens/s": 4,
        "sent": 6,
        "peak": 5,
    }
    columns = [Column("job"), *map(Column, short_names(swept))]
    columns += [Column(name, drop=drop) for name, drop in numbers.items()]
    table = FittedTable([*columns, Column("answer", is_text=True, drop=2), Column("status", is_text=True)])
    for number, record in enumerate(records):
        overridden = [str(record["overrides"].get(name, ABSENT)) for name in swept]
        shown = _sweep_cells(record) if "metrics" in record else {}
        cells = [shown.get(name, ABSENT) for name in (*numbers, "answer")]
        is_exact = record["status"] == "ok" and record.get("metrics", {}).get("exact") and "l_a" in shown
        table.add_row(str(number), *overridden, *cells, "exact" if is_exact else record["status"])
    return table


def _sweep_cells(record: Record) -> dict[str, str]:
    """Return the numbers of a job by column; an evaluation has few of them."""
    metrics = record["metrics"]
    shown = {
        "prefill s": format_prefill(metrics["prefill_s"]),
        "peak": format_bytes(metrics["peak_memory_bytes"]),
        "answer": _sweep_answer(record, metrics),
    }
    if "cells" in metrics:
        return shown
    shown |= {
        "tokens/s": format_number(metrics["prefill_tokens_per_s"]),
        "decode tokens/s": format_number(metrics["decode_tokens_per_s"]),
        "sent": format_bytes(max(metrics["bytes_sent"])),
    }
    if "rounds" in metrics:  # of one document; a batch has many
        shown |= {
            "l_a": format_count(metrics["anchor_length"]),
            "l_p": format_count(metrics["passing_length"]),
            "rounds": str(metrics["rounds"]),
        }
    return shown


def _sweep_answer(record: Record, metrics: Record) -> str:
    if "cells" in metrics:
        if not metrics["measures"]:
            return format_percent(metrics["score"])
        name, first = next(iter(metrics["measures"].items()))
        return f"{name} {ABSENT if first['mean'] is None else format(first['mean'], '.4f')}"
    if "lines" in metrics:
        return f"{format_count(metrics['answered'] + metrics['resumed'])}/{format_count(metrics['lines'])}"
    correct = record["task"]["correct"]
    return ABSENT if correct is None else "right" if correct else "wrong"


def swept_names(records: Sequence[Record]) -> list[str]:
    """Return the overrides that differ between jobs, in the order of the command line; all of them for one job."""
    names = list(dict.fromkeys(name for record in records for name in record["overrides"]))
    if len(records) == 1:
        return names
    return [name for name in names if len({str(record["overrides"].get(name)) for record in records}) > 1]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each config path, or all of it where two would look alike."""
    last = [path.rpartition(".")[2] for path in paths]
    return [short if last.count(short) == 1 else path for short, path in zip(last, paths, strict=True)]
