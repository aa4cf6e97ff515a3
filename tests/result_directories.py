"""Result directories of launch/eval.py, made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apb_ds.config import APBConfig
from apb_ds.report.summary import summarise


def line(prompt: str, score: float | None = None, **changes: Any) -> dict[str, Any]:
    """Return a sample: of the task ``passkey`` with a score, of ``fidelity`` with ``kl=`` and its text for a prompt."""
    base: dict[str, Any] = {
        "labels": {"length": 8},
        "fingerprint": prompt,
        "answer": "",
        "score": score,
        "exact": False,
        "prefill_s": 1.0,
        "seconds": 2.0,
        "flops": {"total": 4e12, "slowest_rank": 2e12},
    }
    if "kl" in changes:
        base |= {"labels": {"text": prompt}, "measures": {"kl": changes.pop("kl"), "top1": 1.0}}
    return base | changes


def failed(prompt: str) -> dict[str, Any]:
    """Return a sample that failed."""
    return {"labels": {"length": 8}, "fingerprint": prompt, "error": "no"}


def write_result(
    directory: Path, lines: Sequence[dict[str, Any]], method: str = "apb", task: str = "passkey", **settings: Any
) -> Path:
    """Write a result directory; `settings` go under ``method``, except ``seed`` and ``tasks``."""

    seed, tasks = settings.pop("seed", 0), settings.pop("tasks", None)
    heads = settings.pop("retaining_heads", None)
    config = APBConfig(method=method, **settings).resolved() | ({"retaining_heads": heads} if heads else {})
    content = {
        "task": task,
        "settings": {
            "model": {"path": "/m/tiny"},
            "method": config,
            "task": {"depth": 0.5, "tasks": tasks},
            "seed": seed,
        },
        **summarise([{**one, "approximate": not APBConfig(method=method).is_exact_method} for one in lines]),
    }
    directory.mkdir(parents=True)
    numbered = [{"id": f"{task}-{number}", **one} for number, one in enumerate(lines)]
    (directory / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in numbered))
    (directory / "summary.json").write_text(json.dumps(content))
    return directory
