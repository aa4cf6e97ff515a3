"""benchmarks/overlap.py: how much of the collectives is hidden, from events written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import overlap
from benchmarks.common import Event
from benchmarks.overlap import ATTENTION, COMMUNICATION, LINEAR, OTHER

EVENTS = [
    Event(0.0, 1000.0, "gemm"),
    Event(500.0, 2500.0, "nccl"),  # 500 behind the product, 1000 behind attention, 500 alone
    Event(1500.0, 2500.0, "flash"),
    Event(2600.0, 3000.0, "copy"),
]


def test_hidden_and_exposed_communication() -> None:
    assert overlap.summarise(EVENTS) == {
        "span_ms": 3.0,
        "computing_ms": 2.4,
        "communicating_ms": 2.0,
        "exposed_ms": pytest.approx(0.5),
        "idle_ms": pytest.approx(0.1),
        "collectives": 1,
    }
    alone = [Event(0.0, 10.0, "copy"), Event(10.0, 30.0, "nccl")]
    assert overlap.summarise(alone)["exposed_ms"] == pytest.approx(0.02)


def test_overlapping_times_count_once() -> None:
    assert overlap.union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", COMMUNICATION),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90", ATTENTION),
        ("nvjet_sm90_tst_256x152_64x4_1x2_h_bz_coopA_TNT", LINEAR),
        ("triton_poi_fused_mul_silu_0", OTHER),
        ("Memcpy DtoD (Device -> Device)", OTHER),
    ],
)
def test_kernels_are_classified_by_name(name: str, kind: str) -> None:
    assert overlap.kind_of(name) == kind


def test_the_figure_shows_the_middle_of_a_prefill(tmp_path: Path) -> None:
    events = [
        Event(100.0 * index + delay, 100.0 * index + 80.0, name, stream)
        for index in range(10)
        for name, stream, delay in (("flash", 7, 0.0), ("nccl", 9, 50.0))
    ]
    shown = overlap.window(events)
    assert [begin for begin, _, _, kind in shown if kind == COMMUNICATION] == [-30.0, 70.0, 170.0, 270.0]
    assert shown[0] == [-80.0, 0.0, 7, ATTENTION]  # it had begun before
    pytest.importorskip("matplotlib")
    overlap.draw(tmp_path / "overlap.png", "two ranks", [{"window": shown}] * 2)
    assert (tmp_path / "overlap.png").stat().st_size > 1000
