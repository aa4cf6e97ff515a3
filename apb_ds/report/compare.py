"""Compare evaluations: ``python -m apb_ds.report.compare DIR DIR ... [--out FILE.json] [--figure FILE.png]``.

Each DIR is an output of launch/eval.py or a sweep's folder. Without ``--against``: each job's means by labels, and
paired differences over the samples that both answered. With ``--against``: the means along a setting, such as
``method.hosts``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
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


def compare_records(records: Sequence[dict[str, Any]], console: Console) -> list[dict[str, Any]]:
    """Print the comparison of a sweep's evaluations, for each choice of task settings that several jobs share.

    Returns
    -------
    list of dict
        What `compare_results` returned for each.
    """
    compared: list[dict[str, Any]] = []
    directories = [record["task"]["directory"] for record in records if "cells" in record.get("metrics", {})]
    groups: dict[str, list[Result]] = {}
    try:
        for result in read_results(directories):
            of_task = {path: value for path, value in result.settings.items() if path.startswith("task.")}
            groups.setdefault(f"{result.task} {of_task} {result.settings.get('seed')}", []).append(result)
    except ValueError as error:
        console.print(f"No comparison: {error}", markup=False)
    for results in groups.values():
        name_results(results)
        try:
            if len(results) > 1:
                compared.append(compare_results(results))
                for table in comparison_tables(compared[-1]):
                    console.print(table)
        except ValueError as error:
            console.print(f"No comparison: {error}", markup=False)
    return compared


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command over directories of results, to be run by `run_command`."""
    parser = argparse.ArgumentParser(prog=f"python -m apb_ds.report.{module}", description=description)
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", type=Path, help="an output of launch/eval.py, or a sweep's folder"
    )
    return parser


def run_command(work: Callable[[], None]) -> int:
    """Do the work of a command; return its exit code: 0, or `FAILED_EXIT` after printing an error."""
    try:
        work()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return FAILED_EXIT
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = make_parser("compare", "Compare evaluations of a task.")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="write the comparison as JSON")
    parser.add_argument("--figure", metavar="FILE.png", type=Path, help="draw it (needs matplotlib)")
    parser.add_argument("--against", metavar="SETTING", help="means along a setting, such as method.compression_ratio")
    parser.add_argument("--ratio-to", metavar="JOB", help="divide divergences by this job's, as the table names it")
    asked = parser.parse_args(arguments)
    return run_command(lambda: _compare(asked))


def _compare(asked: argparse.Namespace) -> None:
    results = read_results(asked.directories)
    draw: Callable[[Path, dict[str, Any]], None]
    if asked.against is None:
        content = compare_results(results, asked.ratio_to)
        tables, draw = comparison_tables(content), draw_comparison
    else:
        content = gather_curves(results, asked.against)
        tables, draw = [curve_table(content)], draw_curves
    console = make_console()
    for table in tables:
        console.print(table)
    if asked.out is not None:
        write_json(asked.out, hide_paths(content))
    if asked.figure is not None:
        draw(asked.figure, content)


if __name__ == "__main__":
    sys.exit(main())
