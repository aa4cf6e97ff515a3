"""Where a prefill's time goes: what each range gets, and measuring changes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

import apb_ds
from apb_ds.bench.breakdown import attribute, measure_parts, named_submodules, submodule_ranges
from apb_ds.bench.plain import prefill
from apb_ds.engine.engine import APBEngine
from apb_ds.ops import profiling
from apb_ds.parallel.emulated import EmulatedGroup
from apb_ds.parallel.groups import SequenceGroup
from tests.models import FAMILIES, build_model, request_ids

APB: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}


def event(name: str, parent: Any = None, own: float = 0.0, kernels: tuple[tuple[str, float], ...] = ()) -> Any:
    """An event on the host, as torch's profiler gives it."""
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        self_cpu_time_total=own,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        device_type=DeviceType.CPU,
        is_async=False,
    )


def on_device(name: str, duration: float, *, is_user_annotation: bool = False) -> Any:
    """An event on the device's timeline."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(elapsed_us=lambda: duration),
        device_type=DeviceType.CUDA,
        is_user_annotation=is_user_annotation,
    )


def profiled() -> list[Any]:
    """A prefill: an MLP's product within its range, a copy outside it, a kernel that no operation launched."""
    root = event("apb_ds.other", own=1e6)
    # The profiler lists a range's time on the device as a kernel, too.
    ffn = event("apb_ds.ffn", root, own=2e6, kernels=(("apb_ds.ffn", 9e6),))
    linear = event("aten::linear", ffn, own=3e6)
    product = event("aten::mm", linear, own=4e6, kernels=(("gemm", 5e6), ("splitk", 1e6)))
    copy = event("aten::copy_", root, own=5e6, kernels=(("copy", 2e6),))
    outside = event("cudaDeviceSynchronize", own=50e6)
    device = [
        on_device("gemm", 5e6),
        on_device("splitk", 1e6),
        on_device("copy", 2e6),
        on_device("triton_", 0.5e6),
        on_device("apb_ds.ffn", 9e6),
        on_device("somebody's range", 9e6, is_user_annotation=True),
    ]
    return [root, ffn, linear, product, copy, outside, *device]


def test_host_time_belongs_to_the_innermost_range() -> None:
    found = attribute(profiled(), on_cuda=False)
    assert found["clock"] == "cpu" and found["unattributed_s"] == 0
    assert found["parts_s"] == dict.fromkeys(profiling.PARTS, 0) | {"ffn": 2 + 3 + 4, "other": 1 + 5}


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    found = attribute(profiled(), on_cuda=True)
    assert found["clock"] == "cuda kernels"
    assert found["unattributed_s"] == pytest.approx(0.5)
    assert found["parts_s"] == pytest.approx(dict.fromkeys(profiling.PARTS, 0) | {"ffn": 5 + 1, "other": 2 + 0.5})


def test_time_of_an_inner_range_is_not_the_outer_ones() -> None:
    root = event("apb_ds.other")
    sending = event("apb_ds.communication", root, own=1e6)
    attention = event("apb_ds.attention", sending, own=2e6)
    parts = attribute([root, sending, attention], on_cuda=False)["parts_s"]
    assert (parts["communication"], parts["attention"], parts["other"]) == (1, 2, 0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "mistral"])
def test_named_submodules_cover_every_layer(family: str) -> None:
    model = build_model(family)
    layers = model.config.num_hidden_layers
    names = [name for _, name in named_submodules(model)]
    projections = 1 if family == "phi3" else 3
    expected = {profiling.QKV: projections * layers, profiling.O_PROJECTION: layers, profiling.FFN: layers}
    assert {name: names.count(name) for name in set(names)} == expected


def make_engine(group: SequenceGroup | None = None, **given: Any) -> APBEngine:
    model = FAMILIES["llama"](num_key_value_heads=4)
    return APBEngine(model, apb_ds.APBConfig(**given), group or SequenceGroup())


@pytest.mark.parametrize(
    ("given", "ranks", "present", "absent"),
    [
        (APB, 1, ("compressor", "attention"), ("communication",)),
        (APB, 2, ("compressor", "attention", "communication"), ()),
        ({"method": "star", "hosts": 4}, 2, ("attention", "communication"), ("compressor",)),
        ({"method": "dense"}, 1, ("attention",), ("compressor", "communication")),
        ({"method": "ring"}, 2, ("attention", "communication"), ("compressor",)),
        ({"method": "ulysses"}, 2, ("attention", "communication"), ("compressor",)),
    ],
)
def test_parts_of_every_method(
    given: dict[str, Any], ranks: int, present: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    engine = make_engine(EmulatedGroup(rank=ranks - 1, world_size=ranks), **given)
    document, query = request_ids(101, 6)
    query_ids = None if engine.apb_config.is_exact_method else query
    parts = measure_parts(engine.module, lambda: engine.prefill(document, query_ids))["parts_s"]
    for name in ("qkv", "o_projection", "ffn", "other", *present):
        assert parts[name] > 0, name
    for name in absent:
        assert parts[name] == 0, name


def test_the_plain_model() -> None:
    model = build_model("llama")
    document, _ = request_ids(101, 6)
    before = model.config._attn_implementation
    parts = measure_parts(model, lambda: prefill(model, document), is_plain=True)["parts_s"]
    assert min(parts[name] for name in ("qkv", "o_projection", "ffn", "attention", "other")) > 0
    assert parts["compressor"] == parts["communication"] == 0
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("given", [APB, {"method": "dense"}])
def test_measuring_changes_no_result_and_leaves_no_hooks(given: dict[str, Any]) -> None:
    engine = make_engine(**given)
    document, query = request_ids(101, 6)
    query_ids = None if engine.apb_config.is_exact_method else query
    before = engine.query_logits(query, context=engine.prefill(document, query_ids))
    contexts: list[Any] = []
    measure_parts(engine.module, lambda: contexts.append(engine.prefill(document, query_ids)))
    assert torch.equal(engine.query_logits(query, context=contexts[0]), before)
    for module in engine.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not profiling.are_recorded()


def test_measuring_leaves_the_plain_models_cache_unchanged() -> None:
    model = build_model("llama")
    document, _ = request_ids(101, 6)
    before = prefill(model, document)
    caches: list[Any] = []
    measure_parts(model, lambda: caches.append(prefill(model, document)), is_plain=True)
    for layer, same in zip(before.layers, caches[0].layers, strict=True):
        assert torch.equal(layer.keys, same.keys) and torch.equal(layer.values, same.values)


def test_ranges_close_after_an_error() -> None:
    model = build_model("llama")
    mlp = model.model.layers[0].mlp  # type: ignore[union-attr, index]

    def fail(*_: Any) -> None:
        raise ValueError("broken")

    with torch.profiler.profile() as profiler, profiling.recorded(), submodule_ranges(model):
        handle = mlp.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="broken"):
            model(request_ids(20, 1)[0])
        handle.remove()
        torch.ones(3).atan()  # no layer does this
    (after,) = [item for item in profiler.events() if item.name == "aten::atan"]
    assert after.cpu_parent is None
