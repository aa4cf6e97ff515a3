"""launch/bench.py as its users start it: a sweep, two jobs of which cannot be measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench_cases import TINY
from tests.launcher.test_launch import run

pytestmark = pytest.mark.launcher


def test_a_sweep(tmp_path: Path) -> None:
    overrides = {**TINY, "bench.repeats": 1, "bench.warmup": 0, "bench.methods": "apb,ulysses"}
    swept = ["bench.lengths=96,120", "bench.emulate_ranks=4", f"hydra.sweep.dir={tmp_path}"]
    arguments = [f"{name}={value}" for name, value in overrides.items()]
    done = run([sys.executable, "launch/bench.py", "-m", *arguments, *swept])
    assert done.code == 2, done.output
    assert done.stderr.count("Error: method=ulysses shares heads over ranks") == 2
    records = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/bench.json")}
    assert {name: record["cases"][0]["document_tokens"] for name, record in records.items()} == {"0": 96, "1": 120}
    assert all(record["emulated"] and record["cases"][0]["method"] == "apb" for record in records.values())
    assert "emulated" in done.stdout
    assert str(tmp_path) not in json.dumps(records)
