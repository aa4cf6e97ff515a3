"""Tables of a benchmark: every case, the ranks of an emulation, and where the time went."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from apb_ds.ops.profiling import PARTS
from apb_ds.report.table import ABSENT, format_bytes, format_count, format_number

Record = dict[str, Any]
EMULATED = "emulated"
LEFT = ("method", "kernel", "of")
WHOLE = (*LEFT, "ranks", "peak", "sent")  # columns whose cells stay on one line

SHORT = {"compressor": "compr.", "communication": "comm.", "attention": "attn.", "o_projection": "o"}


def bench_tables(record: Record) -> list[Table]:
    """Return the tables of a benchmark's record, those with something in them."""
    cases = [case for case in record["cases"] if case["status"] == "ok"]
    tables = [_case_table(record)]
    if any(case["emulated"] for case in cases):
        tables.append(_rank_table(record, [case for case in cases if case["emulated"]]))
    if any(case["breakdown"] for case in cases):
        tables.append(_breakdown_table([case for case in cases if case["breakdown"]]))
    return tables


def title(record: Record) -> str:
    """Return what was measured, in a few words: also that it is emulated, or that layers or weights are not real."""
    layers = record["model"]["layers"]
    parts = [str(record["model"]["source"]), record["model"]["dtype"]]
    if layers["measured"] != layers["of"]:
        of = f" of {layers['of']}" if layers["of"] is not None else ""
        parts.append(f"{layers['measured']}{of} layers measured")
    if record["emulated"]:
        parts.append("ranks emulated")
    return ", ".join(parts)


def slowest_breakdown(case: Record) -> Record:
    """Return the breakdown of the rank whose parts take longest."""
    return max(case["breakdown"], key=lambda parts: sum(parts["parts_s"].values()))


def _case_table(record: Record) -> Table:
    versus = f"vs {record['baseline']}"
    names = ("tokens", "method", "hosts", "ranks", "kernel", "prefill s", "min", "max", versus)
    rows = [_case_cells(case) for case in record["cases"]]
    table = _table(title(record), (*names, "query s", "ms/token", "peak", "sent"), rows)
    notes = []
    if any(case["emulated"] for case in record["cases"]):
        notes.append(f"{EMULATED}: computation of the slowest rank alone, nothing but a prefill")
    if any(_is_too_short(case) for case in record["cases"]):
        notes.append("exact: too short for anything to be saved")
    failed = [case for case in record["cases"] if case["status"] != "ok"]
    notes += [f"{case['name']}, {case['document_tokens']} tokens: {case['error']}" for case in failed]
    table.caption = "\n".join(notes) or None
    return table


def _case_cells(case: Record) -> list[str]:
    settings = case["settings"] or {}
    cells = [
        format_count(case["document_tokens"]),
        case["method"] + (" (exact)" if _is_too_short(case) else ""),
        str(settings.get("hosts") or ABSENT),
        f"{case['ranks']} {EMULATED}" if case["emulated"] else str(case["ranks"]),
        case["kernels"]["prefill"],
    ]
    if case["status"] != "ok":
        return [*cells, case["status"], *[ABSENT] * 7]
    sent = max(case["prefill_bytes_sent"])
    return [
        *cells,
        *(format_seconds(case["prefill"][name]) for name in ("median_s", "min_s", "max_s")),
        ABSENT if case["speedup"] is None else f"{case['speedup']:.2f}x",
        format_seconds(case["query"]["median_s"]) if "query" in case else ABSENT,
        format_number(case["decode"]["median_ms_per_token"]) if "decode" in case else ABSENT,
        format_bytes(case["peak_memory_bytes"]),
        format_bytes(sent) if sent else ABSENT,
    ]


def _is_too_short(case: Record) -> bool:
    """Whether an approximate method runs exact."""
    return bool(case.get("exact")) and case["method"] in ("apb", "star")


def _rank_table(record: Record, cases: list[Record]) -> Table:
    """Return every emulated rank's computation, and what sending would take by the link model."""
    names = ("tokens", "of", "rank", "hosts", "compute s", "rounds s", "sent", "collectives", "sending s")
    rows = [
        [
            format_count(case["document_tokens"]),
            case["name"],
            str(rank["rank"]),
            " ".join(map(str, rank["hosts"])),
            format_seconds(rank["compute"]["median_s"]),
            " + ".join(map(format_seconds, rank["round_median_s"])),
            format_bytes(rank["bytes_sent"]),
            str(rank["collectives"]),
            format_seconds(rank["communication_s"]),
        ]
        for case in cases
        for rank in case["emulated_ranks"]
    ]
    table = _table(f"{EMULATED} ranks", names, rows)
    link = record["link"]
    lines = [
        f"sending: {link['gb_per_s']:g} GB/s for each rank, {link['latency_us']:g} us for each collective; a model"
    ]
    for case in cases:
        hidden, open_ = case["estimate_s"]
        lines.append(
            f"{case['name']}, {format_count(case['document_tokens'])} tokens: rounds in step "
            f"{format_seconds(hidden)} s; with nothing of the sending hidden {format_seconds(open_)} s"
        )
    table.caption = "\n".join(lines)
    return table


def _breakdown_table(cases: list[Record]) -> Table:
    """Return the share of each part in the time of all parts."""
    rows = []
    for case in cases:
        parts = slowest_breakdown(case)
        seconds, over = parts["parts_s"], parts["prefill_over_products"]
        total = sum(seconds.values())
        rows.append(
            [
                format_count(case["document_tokens"]),
                case["name"],
                str(parts["rank"]) if case["ranks"] > 1 else ABSENT,
                format_seconds(total),
                *(f"{100 * seconds[name] / total:.1f}%" if total and seconds[name] else ABSENT for name in PARTS),
                ABSENT if over is None else f"{over:.2f}",
            ]
        )
    names = ("tokens", "of", "rank", "parts s", *(SHORT.get(name, name) for name in PARTS), "over products")
    table = _table("where a prefill's time goes", names, rows)
    table.caption = (
        f"time of the {slowest_breakdown(cases[0])['clock']}, under a profiler; over products: the prefill without "
        "one, over qkv, o, ffn and attn."
    )
    return table


def _table(title: str, names: tuple[str, ...], rows: list[list[str]]) -> Table:
    """Return a table without the columns in which nothing is."""
    table = Table(box=box.SIMPLE_HEAD, title=title, padding=(0, 0, 0, 1))
    used = [index for index in range(len(names)) if any(row[index] != ABSENT for row in rows)]
    for index in used:
        left = names[index] in LEFT
        table.add_column(names[index], justify="left" if left else "right", no_wrap=names[index] in WHOLE)
    for row in rows:
        table.add_row(*(row[index] for index in used))
    return table


def format_seconds(seconds: float) -> str:
    """Return seconds to three digits at least, where they are few."""
    return f"{seconds:.2f}" if seconds >= 10 else f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.4f}"
