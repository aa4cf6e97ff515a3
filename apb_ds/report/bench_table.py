"""Tables of a benchmark: every case, many queries at once, the ranks of an emulation, and where the time went."""

from __future__ import annotations

from typing import Any

from apb_ds.ops.profiling import PARTS
from apb_ds.report.fitting import ABSENT, Column, FittedTable
from apb_ds.report.formats import format_bytes, format_count, format_number, format_seconds

Record = dict[str, Any]
EMULATED = "emulated"
SHORT = {"compressor": "compr.", "communication": "comm.", "attention": "attn.", "o_projection": "o"}


def bench_tables(record: Record) -> list[FittedTable]:
    """Return the tables of a benchmark's record that have any rows."""
    measured = [case for case in record["cases"] if case["status"] == "ok"]
    emulated = [case for case in measured if case["emulated"]]
    broken_down = [case for case in measured if case["breakdown"]]
    tables = [_case_table(record)]
    asked_many = [case for case in measured if case.get("sequences")]
    tables += [_sequences_table(asked_many)] if asked_many else []
    interrupted = [case for case in measured if case.get("interleaving")]
    tables += [_interleaving_table(interrupted)] if interrupted else []
    tables += [_rank_table(record, emulated)] if emulated else []
    tables += [_breakdown_table(broken_down)] if broken_down else []
    return tables


def title(record: Record) -> str:
    """Return in a few words what was measured, and whether ranks are emulated or layers missing."""
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


def _case_table(record: Record) -> FittedTable:
    cases = record["cases"]
    several_hosts = len({(case["settings"] or {}).get("hosts") for case in cases} - {None}) > 1
    several_kernels = len({case["kernels"]["prefill"] for case in cases if case["settings"]}) > 1
    columns = [
        Column("tokens"),
        Column("method", is_text=True),
        Column("hosts", drop=0 if several_hosts else 8),
        Column("ranks", is_text=True),
        Column("kernel", is_text=True, drop=0 if several_kernels else 9),
        Column("prefill s"),
        Column("min", drop=6),
        Column("max", drop=7),
        Column("speedup", drop=1),
        Column("query s", drop=3),
        Column("ms/token", drop=2),
        Column("peak", drop=4),
        Column("sent", drop=5),
    ]
    table = FittedTable(columns, title=title(record))
    for case in cases:
        table.add_row(*_case_cells(case))
    if any(case["speedup"] for case in cases):
        table.notes.append(f"speedup: over {record['baseline']} at the same length")
    if any(case["emulated"] for case in cases):
        table.notes.append(f"{EMULATED}: computation of the slowest rank alone, prefill only")
    if any(_is_too_short(case) for case in cases):
        table.notes.append("exact: the document is too short for the method to save anything")
    for case in cases:
        if case["status"] != "ok":
            table.notes.append(f"{case['name']}, {format_count(case['document_tokens'])} tokens: {case['error']}")
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
        format_seconds(case.get("query", {}).get("median_s")),
        format_number(case.get("decode", {}).get("median_ms_per_token")),
        format_bytes(case["peak_memory_bytes"]),
        format_bytes(sent) if sent else ABSENT,
    ]


def _is_too_short(case: Record) -> bool:
    """Whether an approximate method runs exact."""
    return bool(case.get("exact")) and case["method"] in ("apb", "star")


def _sequences_table(cases: list[Record]) -> FittedTable:
    """Return how fast so many queries about a document are answered, one by one and together."""
    columns = [
        Column("tokens", drop=9),
        Column("case", is_text=True),
        Column("queries"),
        Column("tokens/s one by one"),
        Column("tokens/s together"),
        Column("speedup"),
        Column("ms/step one by one", drop=5),
        Column("ms/step"),
        Column("first token s", drop=1),
        Column("worst", drop=2),
        Column("worst one by one", drop=6),
        Column("suffixes", drop=3),
        Column("peak", drop=4),
    ]
    table = FittedTable(columns, title="many queries about one document")
    for case in cases:
        for found in case["sequences"]:
            one_by_one, together = found["one_by_one"], found["together"]
            table.add_row(
                format_count(case["document_tokens"]),
                case["name"],
                str(found["sequences"]),
                format_number(one_by_one["tokens_per_s"]),
                format_number(together["tokens_per_s"]),
                f"{found['speedup']:.2f}x",
                format_number(one_by_one["step"]["median_ms"]),
                format_number(together["step"]["median_ms"]),
                format_seconds(together["first_token_mean"]["median_s"]),
                format_seconds(together["first_token_worst"]["median_s"]),
                format_seconds(one_by_one["first_token_worst"]["median_s"]),
                format_bytes(together["suffix_bytes"]),
                format_bytes(together["peak_memory_bytes"]),
            )
    query = (
        f"{cases[0]['sequences'][0]['query_tokens']} tokens a query, {cases[0]['sequences'][0]['new_tokens']} an answer"
    )
    table.notes.append(f"{query}; without the document's prefill. Together, unless a column says one by one")
    return table


def _interleaving_table(cases: list[Record]) -> FittedTable:
    """Return the gaps between tokens of sequences during a prefill that makes them wait, and one that does not."""
    columns = [
        Column("tokens", drop=2),
        Column("case", is_text=True),
        Column("queries"),
        Column("steps", is_text=True),
        Column("prefill s"),
        Column("slowdown", drop=1),
        Column("worst gap s"),
        Column("mean gap s"),
    ]
    table = FittedTable(columns, title="another document's prefill while queries are answered")
    for case in cases:
        found = case["interleaving"]
        for name, slowdown in (("apart", ABSENT), ("interleaved", f"{found['slowdown']:.2f}x")):
            prefills = found[name]
            table.add_row(
                format_count(case["document_tokens"]),
                case["name"],
                str(found["sequences"]),
                name,
                *[format_seconds(prefills["prefill"]["median_s"]), slowdown],
                *(format_seconds(prefills[gap]["median_s"]) for gap in ("worst_gap", "mean_gap")),
            )
    table.notes.append("gaps: between a sequence's tokens, medians over the repeats")
    return table


def _rank_table(record: Record, cases: list[Record]) -> FittedTable:
    """Return every emulated rank's computation, and the time to send its bytes by the link model."""
    columns = [
        Column("tokens"),
        Column("case", is_text=True),
        Column("rank"),
        Column("hosts", is_text=True, drop=4),
        Column("compute s"),
        Column("rounds s", is_text=True, drop=3),
        Column("sent", drop=2),
        Column("collectives", drop=5),
        Column("sending s", drop=1),
    ]
    table = FittedTable(columns, title=f"{EMULATED} ranks")
    for case in cases:
        for rank in case["emulated_ranks"]:
            table.add_row(
                format_count(case["document_tokens"]),
                case["name"],
                str(rank["rank"]),
                " ".join(map(str, rank["hosts"])),
                format_seconds(rank["compute"]["median_s"]),
                " + ".join(map(format_seconds, rank["round_median_s"])),
                format_bytes(rank["bytes_sent"]),
                str(rank["collectives"]),
                format_seconds(rank["communication_s"]),
            )
    link = record["link"]
    table.notes.append(
        f"sending, by a link model: {link['gb_per_s']:g} GB/s per rank and {link['latency_us']:g} us per collective"
    )
    for case in cases:
        hidden, exposed = map(format_seconds, case["estimate_s"])
        table.notes.append(
            f"{case['name']}, {format_count(case['document_tokens'])} tokens: {hidden} s with rounds in step and all "
            f"sending hidden, {exposed} s with none hidden"
        )
    return table


def _breakdown_table(cases: list[Record]) -> FittedTable:
    """Return each part's share of the time of all parts."""
    columns = [Column("tokens"), Column("case", is_text=True), Column("rank", drop=1), Column("parts s", drop=1)]
    columns += [Column(SHORT.get(name, name), drop=1) for name in PARTS]
    table = FittedTable([*columns, Column("over products", drop=1)], title="where a prefill's time goes", split=True)
    for case in cases:
        parts = slowest_breakdown(case)
        seconds, over = parts["parts_s"], parts["prefill_over_products"]
        total = sum(seconds.values())
        table.add_row(
            format_count(case["document_tokens"]),
            case["name"],
            str(parts["rank"]) if case["ranks"] > 1 else ABSENT,
            format_seconds(total),
            *(f"{100 * seconds[name] / total:.1f}%" if total and seconds[name] else ABSENT for name in PARTS),
            ABSENT if over is None else f"{over:.2f}",
        )
    table.notes.append(
        f"{slowest_breakdown(cases[0])['clock']} time, under a profiler; over products: the prefill time without the "
        "profiler, over the time of qkv, o, ffn and attn."
    )
    return table
