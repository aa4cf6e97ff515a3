"""Make one evaluation of several of its tasks': ``python -m apb_ds.report.merge DIR DIR ... --out DIR``.

Evaluations of one method that had different ``task.tasks``, and nothing else, become what one with all of them would
have left: so the tasks of a benchmark may run side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apb_ds.report.figures import draw_scores
from apb_ds.report.record import replace_file, write_json
from apb_ds.report.results import FIGURE_NAME, SAMPLES_NAME, SUMMARY_NAME, Result, read_results
from apb_ds.report.summary import summarise

FAILED_EXIT = 2
PARTS = "task.tasks"


def merge_results(results: Sequence[Result]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return samples and summary of one evaluation that has the tasks of all.

    Raises
    ------
    ValueError
        If the evaluations differ in more than in their tasks, or two have a task in common.
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
    approximate = not first.is_exact_method
    settings = first.summary["settings"]
    summary = {
        **{name: value for name, value in first.summary.items() if name != "usage"},
        "settings": {**settings, "task": {**settings["task"], "tasks": tasks}},
        **summarise([{**sample, "approximate": approximate} for sample in numbered]),
    }
    return numbered, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for what cannot be merged."""
    parser = argparse.ArgumentParser(
        prog="python -m apb_ds.report.merge", description="Make one evaluation of several of its tasks'."
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", type=Path, help="what launch/eval.py wrote")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="a new directory")
    asked = parser.parse_args(arguments)
    try:
        samples, summary = merge_results(read_results(asked.directories))
        if asked.out.exists():
            raise ValueError(f"{asked.out} is there already; name another directory.")
        with replace_file(asked.out / SAMPLES_NAME) as stream:
            stream.writelines(json.dumps(sample) + "\n" for sample in samples)
        write_json(asked.out / SUMMARY_NAME, summary)
        title = f"{summary['task']}: {summary['settings']['method']['method']}"
        draw_scores(asked.out / FIGURE_NAME, title, summary["cells"])
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return FAILED_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
