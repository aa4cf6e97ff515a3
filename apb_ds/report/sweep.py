"""What a sweep leaves in its folder: sweep.json and sweep.csv with its jobs, and a figure of its evaluations."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apb_ds.report.figures import draw_comparison
from apb_ds.report.formats import format_percent
from apb_ds.report.paths import hide_paths
from apb_ds.report.record import replace_file, write_json
from apb_ds.report.results import SWEEP_NAME, flatten
from apb_ds.report.table import swept_names

CSV_NAME = "sweep.csv"
FIGURE_STEM = "comparison"
SHOWN_CHARACTERS = 60
Record = dict[str, Any]


def write_sweep(directory: Path, records: Sequence[Record], comparisons: Sequence[Record] = ()) -> list[Path]:
    """Write a sweep's jobs as JSON and CSV, and a figure of each comparison where matplotlib is installed.

    Parameters
    ----------
    records : of all jobs, in their order
    comparisons : of evaluations, as `compare_results` returns them

    Returns
    -------
    list of Path
        What was written.
    """
    jobs = [_job(number, record, swept_names(records), directory) for number, record in enumerate(records)]
    written = [directory / SWEEP_NAME, directory / CSV_NAME]
    content = hide_paths({"jobs": jobs, "comparisons": list(comparisons)}, directory)
    for job, kept in zip(jobs, content["jobs"], strict=True):
        kept["evaluation"] = job["evaluation"]  # relative to the sweep's folder, so that it can be read from there
    write_json(written[0], content)
    _write_csv(written[1], content["jobs"])
    if importlib.util.find_spec("matplotlib") is not None:
        for number, comparison in enumerate(comparisons):
            figure = directory / f"{FIGURE_STEM}{f'_{number + 1}' if number else ''}.png"
            draw_comparison(figure, comparison)
            written.append(figure)
    return written


def job_line(number: int, asked: Mapping[str, str], record: Record, where: Path | None) -> str:
    """Return what a job of a sweep says, on one line; if it failed, why.

    Parameters
    ----------
    asked : what the job has that others have not, by config path
    where : the job's record
    """
    settings = ", ".join(f"{name}={value}" for name, value in asked.items())
    head = f"Job {number}{f' ({settings})' if settings else ''}"
    parts = []
    metrics = record.get("metrics", {})
    if metrics.get("prefill_s") is not None:
        parts.append(f"prefill {metrics['prefill_s']:.2f} s")
    parts.extend(_outcome(record.get("task", {}), metrics))
    if "directory" in record.get("task", {}):
        parts.append(f"results in {record['task']['directory']}")
    if where is not None:
        parts.append(str(where))
    details = ", ".join(parts)
    if record["status"] == "ok":
        return f"{head}: ok, {details}" if details else f"{head}: ok"
    return f"{head} failed: {record['error']} ({details})" if details else f"{head} failed: {record['error']}"


def _outcome(task: Record, metrics: Record) -> list[str]:
    """Return the score of an evaluation, the share of a batch that was answered, or a question's answer."""
    if "cells" in metrics:
        measures = [f"{name} {value['mean']:.4f}" for name, value in metrics["measures"].items() if value["mean"]]
        return measures[:1] or [f"score {format_percent(metrics['score'])}"]
    if "lines" in metrics:
        return [f"answered {metrics['answered'] + metrics['resumed']} of {metrics['lines']}"]
    if task.get("correct") is not None:
        return ["right" if task["correct"] else "wrong"]
    if isinstance(task.get("prediction"), str):
        text = " ".join(task["prediction"].split())
        return [f"answer: {text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + '...'}"]
    return []


def _job(number: int, record: Record, swept: Sequence[str], directory: Path) -> Record:
    metrics = {name: value for name, value in record.get("metrics", {}).items() if name != "cells"}
    evaluation = record.get("task", {}).get("directory") if "cells" in record.get("metrics", {}) else None
    if evaluation is not None:
        evaluation = os.path.relpath(Path(evaluation).absolute(), directory.absolute())
    return {
        "job": number,
        "overrides": {name: record["overrides"].get(name) for name in swept},
        "status": record["status"],
        "error": record["error"],
        "exact": record.get("exact"),
        "correct": record.get("task", {}).get("correct"),
        "metrics": metrics,
        "evaluation": evaluation,
    }


def _write_csv(path: Path, jobs: Sequence[Record]) -> None:
    """Write a row for each job: its overrides, how it ended, and its numbers by dotted path; lists as JSON."""
    rows = []
    for job in jobs:
        rest = {name: value for name, value in job.items() if name != "overrides"}
        rows.append({"job": job["job"], **job["overrides"], **flatten(rest)})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replace_file(path) as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict, tuple, bool)) else value
