"""The benchmark of questions about short documents, on a model of one layer."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import apart


def test_all_questions_are_answered_alike_one_at_a_time_and_together(tmp_path: Path) -> None:
    out = tmp_path / "apart.json"
    sizes = {"sequences": [1, 3], "documents": [4], "num-tokens": [40], "num-query": [5], "num-new": [3]}
    given = [part for name, values in sizes.items() for part in (f"--{name}", *map(str, values))]
    apart.main(["--out", str(out), "--num-layers", "1", *given])
    alone, together = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert (alone["sequences"], together["sequences"]) == (1, 3)
    for run in (alone, together):
        assert run["same_answers"] == 4 and run["new_tokens"] == 12
        assert run["total_s"] > run["prefill_s"] > 0 and run["decode_s"] > 0
