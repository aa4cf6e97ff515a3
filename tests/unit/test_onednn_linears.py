"""Linear layers through oneDNN: the same numbers, and nothing left behind."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import apb_ds
from apb_ds.hf import onednn_linears as linears
from apb_ds.hf.onednn_linears import onednn_linears
from tests.models import build_model


@pytest.mark.parametrize("limit", [0, 2**30], ids=["in place", "reordered"])
@pytest.mark.parametrize("bias", [True, False])
def test_same_numbers(bias: bool, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "MAX_REORDERED_BYTES", limit)
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, bias=bias)
    states = torch.randn(1, 50, 96)
    exact = states.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    with torch.no_grad(), onednn_linears(linear, 50):
        # float32 sums of 96 products of order 1: rounding is of order 1e-6.
        torch.testing.assert_close(linear(states), exact.float(), atol=1e-5, rtol=1e-5)


def test_hooks_run_and_forward_comes_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    with pytest.raises(KeyError), onednn_linears(model, 50):
        assert "forward" in model[0].__dict__
        model(torch.randn(2, 3, 8))
        raise KeyError
    assert seen == ["hook"]
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_leaves_alone_what_it_is_not_for() -> None:
    class Special(nn.Linear):
        pass

    others = nn.ModuleList([Special(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8)])
    with onednn_linears(others, 50):
        assert all("forward" not in module.__dict__ for module in others.modules())


def test_a_failure_on_the_way_in_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    made: list[Any] = []

    def fail_at_the_second(linear: nn.Linear, weight: torch.Tensor) -> Any:
        made.append(linear)
        if len(made) == 2:
            raise MemoryError
        return linear.forward

    monkeypatch.setattr(linears, "_forward_of", fail_at_the_second)
    with pytest.raises(MemoryError), onednn_linears(model, 50):
        pass
    assert len(made) == 2
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_changed_weight_counts() -> None:
    linear = nn.Linear(8, 8, bias=False)
    states = torch.randn(1, 4, 8)
    with torch.no_grad():
        with onednn_linears(linear, 4):
            before = linear(states)
        linear.weight.mul_(2)
        with onednn_linears(linear, 4):
            torch.testing.assert_close(linear(states), 2 * before)


def test_off_where_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(8, 8)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with onednn_linears(linear, 50):
        assert "forward" not in linear.__dict__


@pytest.mark.parametrize("own", [None, "7"])
def test_an_engine_bounds_the_primitive_caches(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in linears.CACHE_CAPACITIES:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name) if own is None else monkeypatch.setenv(name, own)
    apb_ds.init_inference(build_model("llama"))
    expected = own or str(linears.CACHED_PRIMITIVES)
    assert [os.environ[name] for name in linears.CACHE_CAPACITIES] == [expected] * 2
