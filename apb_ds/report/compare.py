"""Compare evaluations: ``python -m apb_ds.report.compare DIR DIR ... [--out FILE.json] [--figure FILE.png]``.

Each DIR is what launch/eval.py wrote. Without ``--against``: each job's means by labels, and paired differences over
the samples that both answered. With ``--against method.hosts`` or another setting: the means along that setting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from apb_ds.report.compare_table import comparison_tables, curve_table
from apb_ds.report.curves import gather_curves
from apb_ds.report.figures import draw_comparison, draw_curves
from apb_ds.report.pairing import compare_results
from apb_ds.report.paths import hide_paths
from apb_ds.report.record import write_json
from apb_ds.report.results import Result, name_results, read_results
from apb_ds.report.table import make_console

FAILED_EXIT = 2


def compare_records(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the comparison of a sweep's evaluations: a table for each task's settings that several jobs share."""
    directories = [record["task"]["directory"] for record in records if "cells" in record.get("metrics", {})]
    try:
        groups = list(_by_task(read_results(directories)))
    except ValueError as error:
        console.print(f"No comparison: {error}", markup=False)
        return
    for results in groups:
        if len(results) < 2:
            continue
        try:
            tables = comparison_tables(compare_results(results))
        except ValueError as error:
            console.print(f"No comparison: {error}", markup=False)
            continue
        for table in tables:
            console.print(table)


def _by_task(results: Iterable[Result]) -> Iterable[list[Result]]:
    """Yield the results that have a task, its settings and the seed in common, named apart."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        asked = {path: value for path, value in result.settings.items() if path.startswith("task.") or path == "seed"}
        groups.setdefault(f"{result.task} {asked}", []).append(result)
    for group in groups.values():
        name_results(group)
        yield group


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for what cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m apb_ds.report.compare", description="Compare evaluations of a task."
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", type=Path, help="what launch/eval.py wrote")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="write the comparison as JSON")
    parser.add_argument("--figure", metavar="FILE.png", type=Path, help="draw it (needs matplotlib)")
    parser.add_argument("--against", metavar="SETTING", help="means along a setting, such as method.compression_ratio")
    parser.add_argument("--ratio-to", metavar="JOB", help="divide divergences by this job's, as the table names it")
    asked = parser.parse_args(arguments)
    console = make_console()
    draw: Callable[[Path, dict[str, Any]], None]
    try:
        results = read_results(asked.directories)
        if asked.against is None:
            content = compare_results(results, asked.ratio_to)
            tables, draw = comparison_tables(content), draw_comparison
        else:
            content = gather_curves(results, asked.against)
            tables, draw = [curve_table(content)], draw_curves
        for table in tables:
            console.print(table)
        if asked.out is not None:
            write_json(asked.out, hide_paths(content))
        if asked.figure is not None:
            asked.figure.parent.mkdir(parents=True, exist_ok=True)
            draw(asked.figure, content)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return FAILED_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
