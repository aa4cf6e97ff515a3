"""benchmarks/numerics.py on a small model, on the CPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "numerics.py"
SMALL = {
    "num-tokens": 520,
    "query-tokens": 8,
    "num-layers": 2,
    "heads": 4,
    "kv-heads": 2,
    "head-dim": 16,
    "intermediate-size": 64,
    "vocab-size": 300,
    "device": "cpu",
}


def test_half_precision_is_near_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "numerics.json"
    arguments = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    record = json.loads(out.read_text(encoding="utf-8"))
    errors = [*record["attention_output_error"], record["logits_error"]]
    # Half precision has 8 bits: much nearer, and the two would not be two; much further, and one would be wrong.
    assert len(errors) == 3 and all(1e-4 < error < 2e-2 for error in errors), errors
    free = record["with_own_choices"]
    assert 0.8 < free["shared_choices"] <= 1.0
    assert free["logits_error"] >= record["logits_error"] / 2
