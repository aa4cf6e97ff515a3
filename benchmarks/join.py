"""One table and one figure of several records of ``launch/bench.py``, against one method at the same length.

    python benchmarks/join.py --out gpus.json --figure gpus.png dense/bench.json apb/bench.json

Records may be of one GPU or several, of real or emulated ranks. The table is Markdown, on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds.report.figures import look_of, new_figure, save_figure, set_lengths_axis
from apb_ds.report.formats import format_seconds
from apb_ds.report.record import write_json
from benchmarks import common

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
OWN = ("complete", "model", "hardware", "versions", "git", "link")  # what the output keeps of each record
OF_CASE = ("name", "document_tokens", "method", "hosts", "ranks", "emulated", "peak_memory_bytes")


def rows_of(records: Sequence[dict[str, Any]], baseline: str) -> list[Row]:
    """Return a row for each case that was measured, by length, with its speed against the baseline's.

    The baseline is its method's first case of the same length, model and hardware; without one there is no comparison.
    """
    rows = [
        {
            "record": index,
            "device": device_of(record),
            "model": record["model"],
            **{name: case[name] for name in OF_CASE},
            "prefill_s": case["prefill"]["median_s"],
            "runs_s": case["prefill"]["runs_s"],
            "in_step_s": case["in_step"]["median_s"] if case["emulated"] else None,
            "ms_per_token": case["decode"]["median_ms_per_token"] if "decode" in case else None,
            "bytes_sent": max(case["prefill_bytes_sent"]),
        }
        for index, record in enumerate(records)
        for case in record["cases"]
        if case["status"] == "ok"
    ]
    rows.sort(key=lambda row: row["document_tokens"])
    for row in rows:
        alike = [other for other in rows if other["method"] == baseline and _are_comparable(other, row)]
        row["speedup"] = alike[0]["prefill_s"] / row["prefill_s"] if alike else None
    return rows


def device_of(record: dict[str, Any]) -> str:
    """Return the name of the device that a record was made on."""
    hardware = record["hardware"]
    return str(hardware.get("gpu") or hardware["cpu"])


def _are_comparable(row: Row, other: Row) -> bool:
    return all(row[name] == other[name] for name in ("document_tokens", "device", "model"))


def name_of(row: Row) -> str:
    """Return in a few words what was measured, and on what."""
    ranks = "" if row["emulated"] else f", {row['ranks']} rank{'s' * (row['ranks'] > 1)}"  # a name has emulated ones
    return f"{row['name']}{ranks}, {row['device']}"


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    cells = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        cells.append(
            (
                f"{row['document_tokens']:,}",
                row["name"],
                f"{row['ranks']}{' emulated' if row['emulated'] else ''}",
                row["device"],
                format_seconds(row["prefill_s"]),
                "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
                "" if row["ms_per_token"] is None else f"{row['ms_per_token']:.1f}",
                f"{row['bytes_sent'] / 2**30:.2f}" if row["bytes_sent"] else "",
                f"{row['peak_memory_bytes'] / 2**30:.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def draw(path: Path, rows: Sequence[Row], baseline: str) -> None:
    """Draw each case's speed over the baseline's, by the document's length."""
    figure, axes = new_figure(8, 5)
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
    set_lengths_axis(axes, sorted({row["document_tokens"] for row in compared}))
    axes.set_ylabel(f"prefill, times as fast as {baseline}")
    save_figure(figure, axes, ", ".join(sorted(devices)), path)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--baseline", default="dense_engine", help="the method to compare with")
    parser.add_argument("--min-tokens", type=int, default=0, help="leave out shorter documents, such as warm-ups")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")
    arguments = parser.parse_args()
    common.check_arguments(parser, arguments)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.records]
    rows = [row for row in rows_of(records, arguments.baseline) if row["document_tokens"] >= arguments.min_tokens]
    sources = [
        {"file": path.name, **{name: record.get(name) for name in OWN}}
        for path, record in zip(arguments.records, records, strict=True)
    ]
    write_json(arguments.out, {"baseline": arguments.baseline, "records": sources, "rows": rows})
    print(markdown(rows))
    if arguments.figure is not None:
        draw(arguments.figure, rows, arguments.baseline)


if __name__ == "__main__":
    main()
