"""Result tables in narrow terminals: no number is broken over two lines, and what matters most stays."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from rich.table import Table

from apb_ds.ops.profiling import PARTS
from apb_ds.report.bench_table import bench_tables
from apb_ds.report.compare_table import comparison_tables, curve_table
from apb_ds.report.curves import gather_curves
from apb_ds.report.fitting import Column, FittedTable
from apb_ds.report.pairing import compare_results
from apb_ds.report.results import read_results
from apb_ds.report.summary import summarise
from apb_ds.report.table import job_table, sweep_table
from tests.result_directories import line, write_result

WIDTHS = (60, 80, 100, 120)
LENGTH = 1_310_944
NUMBER = re.compile(r"\d{1,3}(?: \d{3})+(?!\d)|\d[\d.]*")


def printed(tables: RenderableType | list[Any], width: int) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False)
    for table in tables if isinstance(tables, list) else [tables]:
        console.print(table)
    return stream.getvalue()


def broken_numbers(tables: Any, width: int) -> set[str]:
    """Return what looks like a number at this width and is none where there is room for everything."""
    known = set(NUMBER.findall(printed(tables, 1000)))
    return set(NUMBER.findall(printed(tables, width))) - known


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "document_tokens": LENGTH,
        "query_tokens": 1234,
        "hosts": 128,
        "ranks": 64,
        "rounds": 2,
        "anchor_length": 131_072,
        "passing_length": 16_384,
        "exact": False,
        "prefill_s": 1234.567,
        "prefill_tokens_per_s": 123_456.7,
        "prefill_flops": {"total": 123_456e12, "slowest_rank": 12_345e12},
        "new_tokens": 12_345,
        "decode_tokens_per_s": 1234.5,
        "bytes_sent": [number << 28 for number in range(16, 32)],
        "peak_memory_bytes": 78 << 30,
        **changes,
    }


def job_record(overrides: dict[str, str], **changes: Any) -> dict[str, Any]:
    return {
        "status": "ok",
        "overrides": overrides,
        "task": {"correct": True},
        "metrics": metrics(**changes),
        "kernels": {"prefill": "flash_attn3", "decode": "torch_flash"},
        "model": {"load_s": 123.45},
    }


def evaluation(**changes: Any) -> dict[str, Any]:
    lines = [
        line(f"{length}{index}", index / 3, labels={"num_tokens": length, "depth": 0.25}, approximate=True, **changes)
        for length in (LENGTH, 130_944)
        for index in range(4)
    ]
    summary = summarise([{**one, "prefill_s": 1234.5, "flops": {"total": 4e18, "slowest_rank": 1e18}} for one in lines])
    return {"metrics": {**summary["all"], "cells": summary["cells"], "peak_memory_bytes": 78 << 30}}


def bench_case(method: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": f"{method}, 128 hosts, 64 emulated ranks",
        "method": method,
        "document_tokens": LENGTH,
        "settings": {"hosts": 128},
        "ranks": 64,
        "emulated": True,
        "kernels": {"prefill": "flash_attn3"},
        "status": "ok",
        "error": None,
        "exact": False,
        "prefill": {"median_s": 1234.567, "min_s": 1230.123, "max_s": 1240.987},
        "speedup": 123.45,
        "query": {"median_s": 0.1234},
        "decode": {"median_ms_per_token": 1234.5},
        "peak_memory_bytes": 78 << 30,
        "prefill_bytes_sent": [123 << 28],
        "estimate_s": [1234.567, 1300.123],
        "emulated_ranks": [
            {
                "rank": rank,
                "hosts": [rank, 127 - rank],
                "compute": {"median_s": 1234.567},
                "round_median_s": [1000.123, 234.444],
                "bytes_sent": 123 << 28,
                "collectives": 12_345,
                "communication_s": 65.556,
            }
            for rank in (0, 63)
        ],
        "breakdown": [
            {
                "rank": 63,
                "clock": "cuda kernels",
                "parts_s": dict.fromkeys(PARTS, 123.456),
                "prefill_over_products": 1.25,
            }
        ],
        **changes,
    }


def benchmark() -> dict[str, Any]:
    failed = bench_case("ring", status="failed", error=f"out of memory: {LENGTH:,} tokens".replace(",", " "))
    return {
        "cases": [bench_case("dense_engine", emulated=False), bench_case("apb"), failed],
        "baseline": "dense_engine",
        "emulated": True,
        "link": {"gb_per_s": 50.0, "latency_us": 20.0},
        "model": {"source": "llama", "dtype": "bfloat16", "layers": {"measured": 8, "of": 32}},
    }


def evaluations(folder: Path, task: str) -> list[Any]:
    def lines(shift: float) -> list[dict[str, Any]]:
        made = [line(f"text {index}", 1 / 3 + shift, prefill_s=1234.5) for index in range(4)]
        if task == "fidelity":
            made = [
                line(f"long text {index}.txt", kl=0.0123 * (index + 1) + shift, prefill_s=1234.5) for index in range(4)
            ]
        return made

    directories = [write_result(folder / "dense", lines(0.0), "dense", task=task)]
    for ratio in (2, 4, 8, 16):
        settings = {"compressor": "heads_and_window", "compression_ratio": ratio}
        directories.append(write_result(folder / str(ratio), lines(ratio / 100), task=task, **settings))
    return read_results(directories)


BATCH = {
    "lines": LENGTH,
    "answered": LENGTH - 7,
    "resumed": 1234,
    "failed": 5678,
    "prefills": 1234,
    "exact_prefills": 1111,
    "seconds": 1234.5,
}
MEASURES = {
    "kl": 0.1234,
    "top1": 0.9876,
    "perplexity": 12.3456,
    "exact_perplexity": 11.2345,
    "attention_error": 0.0123,
}
SWEPT = [{"method.compressor": name, "task.num_tokens": str(LENGTH)} for name in ("window", "heads_and_window")]
TABLES = {
    "question": lambda folder: job_table(job_record({})),
    "batch": lambda folder: job_table(job_record({}, **BATCH)),
    "scores": lambda folder: job_table(evaluation()),
    "measures": lambda folder: job_table(evaluation(measures=MEASURES)),
    "sweep": lambda folder: sweep_table(list(map(job_record, SWEPT))),
    "bench": lambda folder: bench_tables(benchmark()),
    "scores compared": lambda folder: comparison_tables(compare_results(evaluations(folder, "passkey"))),
    "divergences compared": lambda folder: comparison_tables(compare_results(evaluations(folder, "fidelity"))),
    "curve": lambda folder: curve_table(gather_curves(evaluations(folder, "passkey"), "method.compression_ratio")),
}
# What must be seen at any width.
ESSENTIAL = {
    "question": ("1 310 944 / 1 234", "1234.57 s", "123 457 tokens/s", "78.00 GiB", "7.75 GiB"),
    "batch": ("1 310 937 of 1 310 944", "1234.57 s", "5 678 failed"),
    "scores": ("1310944", "50.0"),
    "measures": ("1310944", "0.1234"),
    "sweep": ("window", "1234.57", "right"),
    "bench": ("1 310 944", "apb", "64", "1234.57", "123.45x", "63", "14.3%", "1300.12 s"),
    "scores compared": ("33.3", "35.3", "49.3", "+2.0", "+16.0", "1234.50"),
    "divergences compared": ("0.0307", "0.0508", "0.1908", "+0.0200", "95% interval", "1.95 to 2.56"),
    "curve": ("35.3", "37.3", "41.3", "49.3"),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_every_number_is_whole(name: str, width: int, tmp_path: Path) -> None:
    tables = TABLES[name](tmp_path)
    text = printed(tables, width)
    assert broken_numbers(tables, width) == set(), text
    assert max(map(len, text.splitlines())) <= width, text
    missing = [number for number in ESSENTIAL[name] if number not in text]
    assert not missing, f"{missing} in\n{text}"


def test_a_plain_table_breaks_numbers() -> None:
    """The check above can fail."""
    table = Table()
    for _ in range(9):
        table.add_column("tokens")
    table.add_row(*["1 310 944"] * 9)
    assert broken_numbers(table, 60)


def numbers_table(**options: Any) -> FittedTable:
    columns = [Column("name", is_text=True), *(Column(f"c{drop}", drop=drop) for drop in (2, 1, 3))]
    table = FittedTable(columns, **options)
    table.add_row("first and second", "222 222 222", "111 111 111", "333 333 333")
    return table


def test_columns_give_way_in_their_order() -> None:
    shown = {width: printed(numbers_table(), width) for width in (80, 54, 42, 30)}
    found = {
        width: [part for part in ("c1", "c2", "c3") if part in text.split("Not shown")[0]]
        for width, text in shown.items()
    }
    assert found == {80: ["c1", "c2", "c3"], 54: ["c1", "c2", "c3"], 42: ["c1", "c2"], 30: ["c1"]}
    assert "first and second" in shown[80] and "first and second" not in shown[54], "text wraps first"
    assert "Not shown" not in shown[54] and "Not shown at this width: c3." in shown[42]


def test_a_split_table_leaves_nothing_out() -> None:
    text = printed(numbers_table(split=True), 42)
    assert all(f"{digit * 3} {digit * 3} {digit * 3}" in text for digit in "123")
    assert text.count("name") == 2 and "Not shown" not in text


def test_empty_columns_are_left_out() -> None:
    columns = [Column("full"), Column("empty")]
    for keep_empty in (False, True):
        table = FittedTable(columns, keep_empty=keep_empty)
        table.add_row("1", "-")
        assert ("empty" in printed(table, 80)) == keep_empty


def test_brackets_are_no_markup() -> None:
    table = FittedTable([Column("[method]", is_text=True)])
    table.add_row("[apb, star]")
    assert "[method]" in printed(table, 80) and "[apb, star]" in printed(table, 80)
