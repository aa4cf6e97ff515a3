"""Fused norms, MLPs and rotations: the plain model's numbers, and nothing left behind."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import apb_ds
from apb_ds.compressors.base import BlockStates
from apb_ds.compressors.window import WindowCompressor
from apb_ds.hf import fused_layers as fused
from apb_ds.hf.architecture import attention_modules
from apb_ds.hf.fused_layers import ROTATION, FusedLayers, fused_layers
from apb_ds.ops import compiled as compiling
from apb_ds.ops.merge import merge_two, merge_two_fused
from tests.models import build_model, request_ids

NORMS_OF_A_LAYER = {"llama": 2, "qwen2": 2, "qwen3": 4, "mistral": 2, "phi3": 2, "gemma3": 6}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run what would be compiled as it is; return what that was."""
    functions: list[Any] = []

    def keep(function: Any) -> Any:
        functions.append(function)
        return function

    monkeypatch.setattr(fused, "compiled", keep)
    return functions


def leftovers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@torch.no_grad()
@pytest.mark.parametrize("family", NORMS_OF_A_LAYER)
def test_the_plain_models_logits(family: str, uncompiled: list[Any]) -> None:
    model = build_model(family)
    ids = request_ids(60, 5)[0]
    expected = model(ids).logits
    layers = FusedLayers(model)
    num_layers = model.config.num_hidden_layers
    assert layers.counts == {"norms": NORMS_OF_A_LAYER[family] * num_layers + 1, "mlps": num_layers, "rotations": 1}
    assert not leftovers(model)
    space = vars(sys.modules[type(attention_modules(model)[0]).__module__])
    before = space[ROTATION]
    uncompiled.clear()
    with layers.in_force():
        assert len(leftovers(model)) == layers.counts["norms"] + num_layers
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    norm = compiling.rms_norm_around_one if family == "gemma3" else compiling.rms_norm
    assert before in uncompiled and norm in uncompiled
    assert not leftovers(model) and space[ROTATION] is before
    assert torch.equal(model(ids).logits, expected)


def test_compiled_for_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as on CUDA, with torch's own operations in place of generated kernels."""
    real = torch.compile
    monkeypatch.setattr(compiling.torch, "compile", lambda function, **given: real(function, backend="eager", **given))
    compiling.compiled.cache_clear()
    model = build_model("llama")
    layers = FusedLayers(model)
    with torch.no_grad():
        for tokens in (60, 41, 1):
            ids = request_ids(tokens, 5)[0]
            expected = model(ids).logits
            with layers.in_force():
                torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    for tokens in (7, 12, 9):
        merged = [torch.randn(*shape) for shape in 2 * ((1, 2, tokens, 4), (1, 2, tokens))]
        expected = merge_two(*merged)
        torch.testing.assert_close(merge_two_fused(*merged), expected)
        output = torch.zeros(1, tokens + 3, 2, 4).transpose(1, 2)  # as models have it, with more tokens in front
        merge_two_fused(*merged, into=output[:, :, 3:])
        torch.testing.assert_close(output[:, :, 3:], expected)
        assert not output[:, :, :3].any()
        assert torch.equal(merge_two(*merged, into=output[:, :, 3:]), expected)
    for tokens in (40, 61, 33):
        states = torch.randn(3, 1, 2, tokens, 4)
        scores, fused_scores = (
            WindowCompressor().score(BlockStates(*states, start=0, layer_idx=0, scale=0.5, fused=on))
            for on in (False, True)
        )
        torch.testing.assert_close(fused_scores, scores)
    assert compiling.compiled(compiling.rms_norm) is compiling.compiled(compiling.rms_norm)
    compiling.compiled.cache_clear()


class ShiftedNorm(nn.Module):
    """It looks like an RMS norm, and its weights are off by two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.variance_epsilon = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        return compiling.rms_norm(hidden, 2 + self.weight, self.variance_epsilon)


class ClampedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)).clamp(max=0.1) * self.up_proj(hidden))


class GatedMLP(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = activation

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


@torch.no_grad()
def test_activations_of_one_class_with_other_settings(uncompiled: list[Any]) -> None:
    """GELU and its approximation differ by less than half precision tells apart."""
    model = build_model("llama")
    model.odd = nn.ModuleList([GatedMLP(nn.GELU()), GatedMLP(nn.GELU(approximate="tanh")), GatedMLP(nn.GELU())])
    hidden = 3 * torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
    expected = [mlp(hidden) for mlp in model.odd]
    layers = FusedLayers(model)
    assert layers.counts["mlps"] == model.config.num_hidden_layers + 3
    with layers.in_force():
        for mlp, numbers in zip(model.odd, expected, strict=True):
            assert torch.equal(mlp(hidden), numbers)


class TwoInputs(ClampedMLP):
    def forward(self, hidden: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return hidden + other


def test_what_computes_something_else_is_left_alone(uncompiled: list[Any]) -> None:
    model = build_model("llama")
    counts = FusedLayers(model).counts
    layer = model.model.layers[0]
    layer.odd = nn.ModuleList([ShiftedNorm(), ClampedMLP(), TwoInputs(), nn.LayerNorm(8)])
    layers = FusedLayers(model)
    assert layers.counts == counts
    with layers.in_force():
        assert not leftovers(layer.odd)


def test_everything_is_put_back_after_an_error(uncompiled: list[Any]) -> None:
    model = build_model("llama")
    with pytest.raises(ZeroDivisionError), FusedLayers(model).in_force():
        raise ZeroDivisionError
    assert not leftovers(model)


@pytest.mark.parametrize("method", ["apb", "dense"])
def test_the_engines_tokens(method: str, uncompiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    document, query = request_ids(101, 5)
    given: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5} if method == "apb" else {}
    plain = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(method=method, **given))
    expected = plain.generate(document, query, max_new_tokens=6, do_sample=False)
    on_cpu = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(method=method, fused=True, **given))
    assert on_cpu._acceleration.fused is None
    monkeypatch.setattr("apb_ds.engine.acceleration.fused_layers", lambda model, enabled, device: FusedLayers(model))
    engine = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(method=method, fused=True, **given))
    uncompiled.clear()
    assert torch.equal(engine.generate(document, query, max_new_tokens=6, do_sample=False), expected)
    context = engine.prefill(document, query)
    torch.testing.assert_close(
        engine.query_logits(query, context=context),
        plain.query_logits(query, context=plain.prefill(document, query)),
        atol=1e-4,
        rtol=1e-4,
    )
    assert compiling.rms_norm in uncompiled
    assert not leftovers(engine.module)


def test_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(function: Any, **given: Any) -> Any:
        raise RuntimeError("Failed to find a C compiler.\nAnd a long trace.")

    compiling.compiled.cache_clear()
    compiling.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    try:
        assert not compiling.can_compile(torch.device("cpu"))
        assert not compiling.can_compile(torch.device("cpu"))
        assert len(caplog.records) == 1 and "Failed to find a C compiler" in caplog.text
        assert "long trace" not in caplog.text
        monkeypatch.setattr(fused, "can_compile", lambda device: False)
        assert fused_layers(build_model("llama"), True, torch.device("cuda")) is None
    finally:
        compiling.compiled.cache_clear()
        compiling.can_compile.cache_clear()


def test_what_the_compiler_has_no_code_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def broken(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 1:
                return function(*arguments)
            raise TorchDynamoException("no code for this stride")

        return run

    def doubled(number: Tensor) -> Tensor:
        return number * 2

    monkeypatch.setattr(torch, "compile", broken)
    run = compiling.compiled(doubled)
    assert [float(run(torch.tensor(number))) for number in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert len(calls) == 2, "tried once more, not always"
    assert caplog.text.count("doubled runs uncompiled from now on") == 1

    def fail(number: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compiling.compiled(fail)(torch.tensor(1.0))


def test_where_nothing_is_fused() -> None:
    model = build_model("llama")
    assert fused_layers(model, True, torch.device("cpu")) is None
    assert fused_layers(model, False, torch.device("cuda")) is None
