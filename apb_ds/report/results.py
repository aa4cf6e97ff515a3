"""Directories of evaluations, read back: settings, summary and samples, and a name that tells each from the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apb_ds.config import EXACT_METHODS

SAMPLES_NAME = "samples.jsonl"
SUMMARY_NAME = "summary.json"
SWEEP_NAME = "sweep.json"
FIGURE_NAME = "scores.png"
METHOD = "method.method"

Labels = dict[str, Any]
Key = tuple[str, str, int]  # labels as JSON, the prompt's hash, and a number among equal prompts


@dataclass
class Result:
    """One evaluation as read from its directory.

    Attributes
    ----------
    settings : what the answers depend on, by dotted path
    summary : the content of ``summary.json``
    samples : the lines of ``samples.jsonl``
    name : a short name, unique among the results read together
    """

    directory: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    samples: dict[Key, dict[str, Any]] = field(repr=False)
    name: str = ""

    @property
    def task(self) -> str:
        return str(self.summary["task"])

    @property
    def method(self) -> str:
        return str(self.settings[METHOD])

    @property
    def is_exact_method(self) -> bool:
        return self.method in EXACT_METHODS


def read_results(directories: Sequence[str | Path]) -> list[Result]:
    """Read evaluations, each directory once.

    Raises
    ------
    ValueError
        If a file is missing or is not what an evaluation writes.
    """
    found = [path for directory in directories for path in _evaluations_in(Path(directory).expanduser())]
    unique = {path.resolve(): path for path in found}
    results = [_read_result(directory) for directory in unique.values()]
    name_results(results)
    return results


def _evaluations_in(directory: Path) -> list[Path]:
    """Return the evaluations of a sweep's folder; any other directory as it is."""
    sweep = directory / SWEEP_NAME
    if not sweep.is_file():
        return [directory]
    jobs = _parse(sweep, _read(directory, SWEEP_NAME)).get("jobs", [])
    found = [directory / job["evaluation"] for job in jobs if job.get("evaluation")]
    if not found:
        raise ValueError(f"{sweep} has no evaluations to compare: its jobs' numbers are in that file and in sweep.csv.")
    return found


def check_same_task(results: Sequence[Result]) -> None:
    """Raise ValueError unless all results are of one task."""
    first = results[0]
    for result in results:
        if result.task != first.task:
            raise ValueError(
                f"{first.directory} is of task={first.task} and {result.directory} of task={result.task}; give "
                "evaluations of one task."
            )


def name_results(results: Sequence[Result]) -> None:
    """Name each result by the settings that tell it from the others, or else also by its directory."""
    names = name_settings([result.settings for result in results])
    for result, name in zip(results, names, strict=True):
        result.name = f"{name} ({result.directory})" if names.count(name) > 1 else name


def name_settings(all_settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each settings the method and what differs; a method's own settings are compared within the method."""
    names = []
    for settings in all_settings:
        method = settings.get(METHOD)
        peers = [other for other in all_settings if other.get(METHOD) == method]
        parts = [] if method is None else [str(method)]
        for path in settings:
            others = peers if path.startswith("method.") else all_settings
            # A setting that only one of them has is no difference: another setting shows it, as the compressor does
            # for its heads.
            if any(path in other and _text(other[path]) != _text(settings[path]) for other in others):
                parts.append(f"{path.rpartition('.')[2]}={_shown(path, settings[path])}")
        names.append(", ".join(parts) or "all")
    return names


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return flat


def _shown(path: str, value: Any) -> str:
    if value is None:
        return "default"
    return Path(value).name if path == "model.path" and isinstance(value, str) else _text(value).strip('"')


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _read_result(directory: Path) -> Result:
    summary = _parse(directory / SUMMARY_NAME, _read(directory, SUMMARY_NAME))
    found = summary.get("settings")
    flat = flatten(found) if isinstance(found, dict) else {}
    settings = {path: value for path, value in flat.items() if value != {}}  # an empty section sets nothing
    parts = ("task", "settings", "all", "cells")
    if not all(part in summary for part in parts) or METHOD not in settings:
        raise ValueError(f"{directory / SUMMARY_NAME} is not a summary of launch/eval.py: it needs {', '.join(parts)}.")
    samples: dict[Key, dict[str, Any]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for number, line in enumerate(_read(directory, SAMPLES_NAME).splitlines(), start=1):
        where = f"{directory / SAMPLES_NAME}, line {number},"
        sample = _parse(where, line)
        if "labels" not in sample or "fingerprint" not in sample:
            raise ValueError(f"{where} is not a sample of launch/eval.py: labels or fingerprint is missing.")
        same = _text(sample["labels"]), str(sample["fingerprint"])
        samples[(*same, seen[same])] = sample
        seen[same] += 1
    return Result(directory, settings, summary, samples)


def _read(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{directory / name} cannot be read ({error}); name the directory that launch/eval.py printed (Results: "
            "...). An interrupted evaluation has no summary: rerun the same command to finish it."
        ) from error


def _parse(where: str | Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a JSON object.")
    return content
