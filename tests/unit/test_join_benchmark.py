"""benchmarks/join.py: rows of several records, compared at the same length."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import join


def case(method: str, tokens: int, seconds: float, **given: Any) -> dict[str, Any]:
    return {
        "status": "ok",
        "method": method,
        "name": method if given.get("hosts") is None else f"{method}, {given['hosts']} hosts",
        "document_tokens": tokens,
        "hosts": None,
        "ranks": 1,
        "emulated": False,
        "prefill": {"median_s": seconds, "runs_s": [seconds]},
        "prefill_bytes_sent": [0, 2**30] if given.get("ranks", 1) > 1 else [0],
        "peak_memory_bytes": 2**31,
        **given,
    }


def record(*cases: dict[str, Any], gpu: str = "one") -> dict[str, Any]:
    return {"cases": list(cases), **dict.fromkeys(join.OWN), "hardware": {"gpu": gpu, "cpu": "any"}}


ONE = record(
    case("dense_engine", 2000, 8.0, decode={"median_ms_per_token": 12.5}),
    case("dense_engine", 1000, 2.0),
    {"status": "failed", "method": "apb", "document_tokens": 4000},
)
SEVERAL = record(
    case("apb", 2000, 1.0, ranks=4, hosts=8),
    case("ring", 2000, 2.0, ranks=4),
    case("apb", 2000, 0.5, ranks=4, name="apb, 16 hosts, 4 emulated ranks", emulated=True, in_step={"median_s": 0.6}),
    case("apb", 4000, 3.0, ranks=4, hosts=8),
)
OTHER = record(case("apb", 2000, 1.0, hosts=8), gpu="another")


def test_rows_are_compared_at_the_same_length() -> None:
    rows = join.rows_of([ONE, SEVERAL, OTHER], "dense_engine")
    assert [(row["document_tokens"], join.name_of(row), row["speedup"]) for row in rows] == [
        (1000, "dense_engine, 1 rank, one", 1.0),
        (2000, "dense_engine, 1 rank, one", 1.0),
        (2000, "apb, 8 hosts, 4 ranks, one", 8.0),
        (2000, "ring, 4 ranks, one", 4.0),
        (2000, "apb, 16 hosts, 4 emulated ranks, one", 16.0),
        (2000, "apb, 8 hosts, 1 rank, another", None),
        (4000, "apb, 8 hosts, 4 ranks, one", None),
    ]
    assert [row["in_step_s"] for row in rows] == [None] * 4 + [0.6, None, None]


def test_table_record_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for name, content in (("one", ONE), ("several", SEVERAL)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    out, figure = tmp_path / "joined.json", tmp_path / "joined.png"
    files = [str(tmp_path / "one.json"), str(tmp_path / "several.json")]
    options = ["--out", str(out), "--figure", str(figure), "--min-tokens", "1500"]
    monkeypatch.setattr(sys, "argv", ["join.py", *files, *options])
    join.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| 2,000 | dense_engine | 1 | one | 8.000 | 1.00x | 12.5 |  | 2.0 |"
    assert lines[3] == "| 2,000 | apb, 8 hosts | 4 | one | 1.000 | 8.00x |  | 1.00 | 2.0 |"
    assert lines[5].startswith("| 2,000 | apb, 16 hosts, 4 emulated ranks | 4 emulated | one | 0.500 | 16.00x |")
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [source["file"] for source in written["records"]] == ["one.json", "several.json"]
    assert len(written["rows"]) == 5 and figure.stat().st_size > 1000
