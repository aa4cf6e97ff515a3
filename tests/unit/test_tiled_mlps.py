"""MLPs a tile of tokens at a time: the same numbers, and nothing is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apb_ds
from apb_ds.hf import fused_layers as fused
from apb_ds.hf.fused_layers import FusedLayers
from apb_ds.hf.tiled_mlps import check_tile, mlp_modules, tiled_mlps
from tests.models import build_model, request_ids

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3")


def count_tokens(model: nn.Module) -> list[int]:
    """Have the down projections say of how many tokens each of their calls is."""
    seen: list[int] = []
    for module in mlp_modules(model):
        down: Any = module.down_proj
        down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2]))
    return seen


def leftovers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@torch.no_grad()
@pytest.mark.parametrize("tile", [1, 16, 59, 60, 61])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_models_logits(family: str, tile: int) -> None:
    model = build_model(family)
    ids = request_ids(60, 5)[0]
    expected = model(ids).logits
    seen = count_tokens(model)
    with tiled_mlps(model, tile):
        assert len(leftovers(model)) == model.config.num_hidden_layers
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not leftovers(model)
    assert max(seen) == min(tile, 60) and sum(seen) == 60 * model.config.num_hidden_layers


@torch.no_grad()
def test_with_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "compiled", lambda function: function)
    model = build_model("llama")
    ids = request_ids(60, 5)[0]
    expected = model(ids).logits
    layers = FusedLayers(model)
    with layers.in_force():
        within = leftovers(model)
        with tiled_mlps(model, 7):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert leftovers(model) == within, "fused as before"
    assert not leftovers(model)


def test_everything_is_put_back_after_an_error() -> None:
    model = build_model("llama")
    with pytest.raises(ZeroDivisionError), tiled_mlps(model, 3):
        raise ZeroDivisionError
    assert not leftovers(model)


@pytest.mark.parametrize("method", ["apb", "dense"])
def test_the_engines_tokens(method: str) -> None:
    document, query = request_ids(101, 5)
    given: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5} if method == "apb" else {}
    plain = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(method=method, **given))
    expected = plain.generate(document, query, max_new_tokens=6, do_sample=False)
    engine = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(method=method, mlp_tile=4, **given))
    seen = count_tokens(engine.module)
    assert torch.equal(engine.generate(document, query, max_new_tokens=6, do_sample=False), expected)
    assert max(seen) == 4
    assert not leftovers(engine.module)


class Ungated(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_model_without_such_mlps() -> None:
    check_tile(Ungated(), None)
    with pytest.raises(ValueError, match=r"mlp_tile=4.*Ungated"):
        check_tile(Ungated(), 4)
