"""What a benchmark reads from clocks, and how it summarises timings."""

from __future__ import annotations

import subprocess
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apb_ds.bench import clocks
from apb_ds.bench.timing import Stopwatch, spread

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_laps_lie_between_marks() -> None:
    watch = Stopwatch(CPU)
    time.sleep(0.02)
    watch.mark()
    watch.mark()
    first, second = watch.laps()
    assert first >= 0.02 > second >= 0


class FakeEvent:
    """A CUDA event of a made-up stream."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        FakeEvent.now_ms += 250
        self.at_ms = FakeEvent.now_ms

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at_ms - self.at_ms


def test_cuda_uses_events_and_synchronizes_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    watch = Stopwatch(CUDA)
    watch.mark()
    watch.mark()
    assert waited == [CUDA]
    assert watch.laps() == [0.25, 0.25]
    assert waited == [CUDA, CUDA]


def test_spread() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 100.0], "s") == {
        "runs_s": [4.0, 1.0, 2.0, 3.0, 100.0],
        "median_s": 3.0,
        "min_s": 1.0,
        "max_s": 100.0,
        "quartiles_s": [2.0, 4.0],
    }


def test_spread_of_one_run() -> None:
    assert spread([2.5], "ms") == {
        "runs_ms": [2.5],
        "median_ms": 2.5,
        "min_ms": 2.5,
        "max_ms": 2.5,
        "quartiles_ms": [2.5, 2.5],
    }


def test_clocks_are_parsed() -> None:
    parsed = clocks.parse_clocks("1980, 1980, 512.33, [N/A]\n")
    assert parsed == {"sm_mhz": 1980.0, "max_sm_mhz": 1980.0, "power_w": 512.33, "temperature_c": None}
    assert clocks.parse_clocks("") is None
    assert clocks.parse_clocks("No devices were found") is None


def test_clocks_are_read_for_the_device_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout="1755, 1980, 600.0, 55")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))
    read = clocks.read_clocks(CUDA)
    assert read is not None and read["sm_mhz"] == 1755
    assert commands[0][-2:] == ["-i", "GPU-1-2-3"]


def test_clocks_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clocks.read_clocks(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert clocks.read_clocks(CUDA) is None
    assert clocks.summarise_clocks([None, None]) is None


def test_clocks_are_summarised_over_runs() -> None:
    readings = [clocks.parse_clocks(f"{clock}, 1980, [N/A], 50") for clock in (1700, 1500, 1900)]
    summary = clocks.summarise_clocks([*readings, None])
    assert summary is not None
    assert summary["sm_mhz"] == {"min": 1500, "max": 1900}
    assert summary["power_w"] is None
