"""Merge evaluations of a benchmark's tasks into one: ``python -m apb_ds.report.merge DIR DIR ... --out DIR``.

The evaluations must have the same settings but for ``task.tasks``. The result is what one evaluation of all these tasks
would leave, so that the tasks of a benchmark can run side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apb_ds.report.compare import make_parser, run_command
from apb_ds.report.figures import draw_scores
from apb_ds.report.record import replace_file, write_json
from apb_ds.report.results import FIGURE_NAME, SAMPLES_NAME, SUMMARY_NAME, Result, read_results
from apb_ds.report.summary import summarise

PARTS = "task.tasks"


def merge_results(results: Sequence[Result]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return samples and summary of one evaluation with the tasks of all.

    Raises
    ------
    ValueError
        If the evaluations differ in more than their tasks, or two have a task in common.
    """
    first = results[0]
    for result in results[1:]:
        paths = dict.fromkeys([*first.settings, *result.settings])
        differing = [path for path in paths if path != PARTS and first.settings.get(path) != result.settings.get(path)]
        if result.task != first.task or differing:
            raise ValueError(
                f"{first.directory} and {result.directory} are not parts of one evaluation: they differ in "
                f"{', '.join(differing) or 'task'}."
            )
    tasks = [name for result in results for name in result.settings.get(PARTS) or [None]]
    twice = sorted({str(name) for name in tasks if tasks.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: more than one of these evaluations has that in {PARTS}.")
    samples = [sample for result in results for sample in result.samples.values()]
    numbered = [{**sample, "id": f"{first.task}-{number}"} for number, sample in enumerate(samples)]
    settings = first.summary["settings"]
    summary = {
        **{name: value for name, value in first.summary.items() if name != "usage"},
        "settings": {**settings, "task": {**settings["task"], "tasks": tasks}},
        **summarise([{**sample, "approximate": not first.is_exact_method} for sample in numbered]),
    }
    return numbered, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = make_parser("merge", "Merge evaluations of a benchmark's tasks into one.")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="a new directory")
    asked = parser.parse_args(arguments)
    return run_command(lambda: _merge(asked))


def _merge(asked: argparse.Namespace) -> None:
    samples, summary = merge_results(read_results(asked.directories))
    if asked.out.exists():
        raise ValueError(f"{asked.out} exists already; name a new directory.")
    with replace_file(asked.out / SAMPLES_NAME) as stream:
        stream.writelines(json.dumps(sample) + "\n" for sample in samples)
    write_json(asked.out / SUMMARY_NAME, summary)
    title = f"{summary['task']}: {summary['settings']['method']['method']}"
    draw_scores(asked.out / FIGURE_NAME, title, summary["cells"])


if __name__ == "__main__":
    sys.exit(main())
