"""One table and one figure of several records of ``launch/bench.py``, against one method at the same length.

    python benchmarks/join.py --out gpus.json --figure gpus.png dense/bench.json apb/bench.json

Records of one GPU and of several, real ranks and emulated ones. The table is Markdown, on standard output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds.report.bench_table import format_seconds
from apb_ds.report.figures import legend_columns, look_of
from apb_ds.report.record import write_json

Row = dict[str, Any]
COLUMNS = (
    "document",
    "method",
    "hosts",
    "GPUs",
    "prefill, s",
    "times as fast",
    "ms per token",
    "GiB sent",
    "peak, GiB",
)
OWN = ("complete", "model", "hardware", "versions", "git", "link")  # what each record says of itself


def rows_of(records: Sequence[dict[str, Any]], baseline: str) -> list[Row]:
    """Return a row for each case that was measured, by length, with its speed against the baseline's.

    The baseline's first case of a length counts, of the same model on the same hardware. Where there is none, nothing
    is compared.
    """
    rows = []
    for index, record in enumerate(records):
        for case in record["cases"]:
            if case["status"] != "ok":
                continue
            rows.append(
                {
                    "record": index,
                    "device": device_of(record),
                    "model": record["model"],
                    "name": case["name"],
                    "document_tokens": case["document_tokens"],
                    "method": case["method"],
                    "hosts": case["hosts"],
                    "ranks": case["ranks"],
                    "emulated": case["emulated"],
                    "prefill_s": case["prefill"]["median_s"],
                    "runs_s": case["prefill"]["runs_s"],
                    "in_step_s": case["in_step"]["median_s"] if case["emulated"] else None,
                    "ms_per_token": case["decode"]["median_ms_per_token"] if "decode" in case else None,
                    "bytes_sent": max(case["prefill_bytes_sent"]),
                    "peak_memory_bytes": case["peak_memory_bytes"],
                }
            )
    rows.sort(key=lambda row: row["document_tokens"])
    for row in rows:
        like = [other for other in rows if other["method"] == baseline and _are_comparable(other, row)]
        row["speedup"] = like[0]["prefill_s"] / row["prefill_s"] if like else None
    return rows


def device_of(record: dict[str, Any]) -> str:
    """Return the name of the device that a record is of."""
    hardware = record["hardware"]
    return str(hardware.get("gpu") or hardware["cpu"])


def _are_comparable(row: Row, other: Row) -> bool:
    return all(row[name] == other[name] for name in ("document_tokens", "device", "model"))


def name_of(row: Row) -> str:
    """Return what was measured on what, in a few words."""
    ranks = "" if row["emulated"] else f", {row['ranks']} rank{'s' * (row['ranks'] > 1)}"  # a name has emulated ones
    return f"{row['name']}{ranks}, {row['device']}"


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = [
            f"{row['document_tokens']:,}",
            row["name"],
            f"{row['ranks']}{' emulated' if row['emulated'] else ''}",
            row["device"],
            format_seconds(row["prefill_s"]),
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            "" if row["ms_per_token"] is None else f"{row['ms_per_token']:.1f}",
            f"{row['bytes_sent'] / 2**30:.2f}" if row["bytes_sent"] else "",
            f"{row['peak_memory_bytes'] / 2**30:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Row], baseline: str) -> None:
    """Draw over the document's length how many times as fast as the baseline each case is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    compared = [row for row in rows if row["speedup"] is not None]
    devices = {row["device"] for row in compared}
    for number, name in enumerate(dict.fromkeys(map(name_of, compared))):
        of_name = [row for row in compared if name_of(row) == name]
        axes.plot(
            [row["document_tokens"] for row in of_name],
            [row["speedup"] for row in of_name],
            **look_of(number),
            linestyle="--" if of_name[0]["emulated"] else "-",
            label=name.removesuffix(f", {of_name[0]['device']}") if len(devices) == 1 else name,
        )
    lengths = sorted({row["document_tokens"] for row in compared})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_title(", ".join(sorted(devices)))
    axes.set_xlabel("tokens of the document")
    axes.set_ylabel(f"prefill, times as fast as {baseline}")
    figure.legend(loc="outside lower center", ncols=legend_columns(axes.get_legend_handles_labels()[1]))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--baseline", default="dense_engine", help="the method that others are compared with")
    parser.add_argument("--min-tokens", type=int, default=0, help="leave out shorter documents, such as warm-ups")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.records]
    rows = [row for row in rows_of(records, arguments.baseline) if row["document_tokens"] >= arguments.min_tokens]
    sources = [
        {"file": path.name, **{name: record.get(name) for name in OWN}}
        for path, record in zip(arguments.records, records, strict=True)
    ]
    write_json(arguments.out, {"baseline": arguments.baseline, "records": sources, "rows": rows})
    print(markdown(rows))
    if arguments.figure is not None:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--figure needs matplotlib (pip install 'apb_ds[eval]')")
        draw(arguments.figure, rows, arguments.baseline)


if __name__ == "__main__":
    main()
