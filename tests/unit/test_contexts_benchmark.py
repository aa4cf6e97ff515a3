"""benchmarks/contexts.py: every step is measured, and what it leaves behind is its record alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from apb_ds.engine.engine import APBEngine
from benchmarks import common, contexts
from tests.models import llama


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").mkdir()
    arguments = ["--num-tokens", "200", "--query-tokens", "5", "--layers", "3", "--hosts", "2", "--repeats", "2"]
    paths = ["--folder", str(tmp_path / "saved"), "--out", str(tmp_path / "contexts.json")]
    monkeypatch.setattr(common, "load_llama", lambda num_layers: SimpleNamespace(model=llama()))
    monkeypatch.setattr(sys, "argv", ["contexts.py", *arguments, *paths])
    contexts.main()


def test_every_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch)
    record = json.loads((tmp_path / "contexts.json").read_text())
    names = ["prefill, dense", "prefill, apb", "to_host", "to_device", "save", "load, page cache", "load, disk"]
    assert list(record["steps"]) == [*names, "load to host, page cache"]
    assert record["bytes"] == 200 * 3 * 2 * 2 * 16 * 4, "tokens, layers, keys and values, heads, channels, float32"
    for step in record["steps"].values():
        assert len(step["runs_s"]) == 2 and min(step["runs_s"]) > 0 and step["gib_per_s"] > 0
    assert os.listdir(tmp_path / "saved") == []


def test_a_context_that_came_back_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = APBEngine.load_context

    def damaged(self: APBEngine, *arguments: object, **given: object) -> object:
        context = load(self, *arguments, **given)  # type: ignore[arg-type]
        context.cache.layer(0).shard()[0].add_(1.0)
        return context

    monkeypatch.setattr(APBEngine, "load_context", damaged)
    with pytest.raises(RuntimeError, match="not what it was"):
        run(tmp_path, monkeypatch)
