"""Named parts: profiler ranges while they are recorded, otherwise nothing."""

from __future__ import annotations

import pytest
import torch

from apb_ds.ops import profiling


@profiling.belongs_to(profiling.FFN)
def double(tensor: torch.Tensor) -> torch.Tensor:
    """Twice as much."""
    return 2 * tensor


def names(events: object) -> list[str]:
    return [event.name for event in events if event.name.startswith(profiling.PREFIX)]  # type: ignore[attr-defined]


def test_off_by_default() -> None:
    with torch.profiler.profile() as profiler, profiling.part(profiling.QKV):
        double(torch.ones(3))
    assert names(profiler.events()) == []
    assert not profiling.are_recorded()


def test_recorded_ranges_nest() -> None:
    with torch.profiler.profile() as profiler, profiling.recorded(), profiling.part(profiling.QKV):
        assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    by_name = {event.name: event for event in profiler.events()}
    inner = by_name[profiling.PREFIX + profiling.FFN]
    assert inner.cpu_parent.name == profiling.PREFIX + profiling.QKV
    assert by_name["aten::mul"].cpu_parent is inner


def test_an_error_turns_them_off() -> None:
    with pytest.raises(ValueError), profiling.recorded():
        raise ValueError
    assert not profiling.are_recorded()


def test_a_decorated_function_keeps_its_name() -> None:
    assert (double.__name__, double.__doc__) == ("double", "Twice as much.")
