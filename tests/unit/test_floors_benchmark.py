"""benchmarks/floors.py: operations and bytes of a record's cases over rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import floors

RECORDS = Path(__file__).resolve().parents[1] / "data" / "bench"  # excerpts of records in docs/results/bench


def test_a_step_reads_all_weights_but_the_embedding() -> None:
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # Llama-3.1-8B's, without embedding and norms
    assert floors.step_bytes(floors.LLAMA_8B, 0, itemsize=2) == 2 * weights
    cache = floors.step_bytes(floors.LLAMA_8B, 1000, itemsize=2) - 2 * weights
    assert cache == 1000 * 131_072


def test_floors_of_a_record() -> None:
    alone, emulated = (json.loads((RECORDS / name).read_text()) for name in ("one_gpu_128k.json", "emulated_128k.json"))
    rates = {"products": 6e14, "causal": 5e14, "unmasked": 7e14, "bandwidth": 3e12}
    dense = floors.floors_of(alone, rates)[0]
    star, apb, _ = floors.floors_of(emulated, rates)
    assert [entry["name"].partition(",")[0] for entry in (dense, star, apb)] == ["dense_engine", "star", "apb"]
    n = 130944
    # Dense by hand: linear layers but for what follows the last attention, and half a square of attention.
    before, after = 4096 * 6144, 4096 * 4096 + 3 * 4096 * 14336
    expected = 2 * n * (32 * before + 31 * after) / 6e14 + 4 * 31 * 4096 * n * (n + 1) / 2 / 5e14
    assert dense["prefill_floor_s"] == pytest.approx(expected, rel=1e-12)
    assert apb["prefill_floor_s"] < star["prefill_floor_s"] < dense["prefill_floor_s"] / 6
    for entry in (dense, star, apb):
        assert entry["prefill_over_floor"] == entry["prefill_s"] / entry["prefill_floor_s"]
    changed = rates | {"unmasked": 3.5e14}
    assert floors.floors_of(alone, changed)[0] == dense
    assert floors.floors_of(emulated, changed)[1]["prefill_floor_s"] > apb["prefill_floor_s"]


def test_rates_are_measured_in_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("apb_ds.bench.timing.time.perf_counter", lambda: clock)

    def work() -> None:
        nonlocal clock
        clock += 1.0 if clock < 20 else 2.0

    assert floors.sustained(work, 40, torch.device("cpu")) == 2.0


def test_measure_rates() -> None:
    sizes = floors.ModelSizes(2, 4, 2, 16, hidden_size=64, intermediate_size=96, vocab_size=100)
    rates = floors.measure_rates(sizes, 64, 2**20, 0.01, torch.device("cpu"))
    assert all(rates[name] > 0 for name in ("products", "causal", "unmasked", "bandwidth"))
    assert rates["products"] == max(rates["measured"]["products"].values()) and rates["kernel"] == "cpu_flash"
