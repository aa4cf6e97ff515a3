"""Layers with windows, sinks, capped logits, latents or another layer's keys: the engine against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

import apb_ds
from apb_ds.cache import WindowCacheLayer
from apb_ds.engine.engine import APBEngine
from apb_ds.hf.probe import probe_model
from apb_ds.methods.state import PrefillState, Tools
from apb_ds.ops.kernels.torch_kernels import CPUFlashKernel
from apb_ds.parallel.emulated import EmulatedGroup
from apb_ds.parallel.pending import PendingGather, PendingShift
from tests.conformance.builder import build as build_tiny
from tests.conformance.checks import request_ids as ordinary_ids
from tests.engine_cases import TOLERANCE, Case
from tests.heads import engine_with_heads
from tests.models import HYBRIDS, WINDOW, build_model, request_ids
from tests.reference import STAR, reference_greedy, run_reference

# Documents of several windows, one shorter than a window, blocks shorter than a window, and blocks of several.
CASES = [
    Case("defaults", 203, 7),
    Case("blocks longer than the window", 130, 6, {"hosts": 4, "anchor_length": 12, "passing_length": 4}),
    Case("anchor longer than the window", 230, 6, {"hosts": 4, "anchor_length": 45, "passing_length": 4}),
    Case("blocks shorter than the window", 90, 5, {"hosts": 16, "anchor_length": 3, "query_in_anchor": False}),
    Case("document shorter than the window", 15, 4, {"hosts": 4, "anchor_length": 0, "passing_length": 1}),
    Case("query longer than the window", 90, 33, {"hosts": 4, "query_in_anchor": False, "compressor": "keydiff"}),
    Case("query compressor", 130, 6, {"hosts": 4, "compressor": "query", "passing_length": 4}),
    Case("empty blocks", 5, 3, {"hosts": 8, "anchor_length": 1, "passing_length": 1, "query_in_anchor": False}),
    Case("star", 118, 5, {"hosts": 4, **STAR}),
    Case("exact", 60, 9),
]
WAYS: list[dict[str, Any]] = [{}, {"schedule": "natural", "hosts_per_round": 3}]


def new_engine(family: str, **given: Any) -> Any:
    return apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**given))


@pytest.mark.parametrize("family", HYBRIDS)
def test_logits_and_tokens_are_the_references(family: str) -> None:
    engine, judge = new_engine(family), build_model(family)
    for case in CASES:
        document, query = case.ids()
        expected = run_reference(judge, document, query, **case.reference_settings(family)).logits
        for way in WAYS:
            engine.configure(apb_ds.APBConfig(**case.given, **way))
            logits = engine.query_logits(query, context=engine.prefill(document, query))
            assert float((logits - expected).abs().max()) < TOLERANCE, (case.name, way)
    case = CASES[1]
    document, query = case.ids()
    engine.configure(apb_ds.APBConfig(**case.given))
    tokens = engine.generate(document, query, max_new_tokens=5, do_sample=False)
    assert tokens.tolist() == reference_greedy(judge, document, query, 5, **case.given).tolist()


@pytest.mark.parametrize("family", ["mistral_window", "gemma3", "gpt_oss"])
def test_a_window_of_another_length_would_be_noticed(family: str) -> None:
    case = Case("blocks longer than the window", 130, 6, {"hosts": 4, "anchor_length": 12, "passing_length": 4})
    document, query = case.ids()
    engine = new_engine(family, **case.given)
    logits = engine.query_logits(query, context=engine.prefill(document, query))

    def one_more(layer: int, masks: Tensor, layout: Any) -> Tensor:
        if engine.layers[layer].window is None:
            return masks
        wider = masks.clone()
        for row in range(layout.document_start + WINDOW, layout.num_tokens):
            wider[:, row, row - WINDOW] = True
        return wider

    other = run_reference(build_model(family), document, query, edit_mask=one_more, **case.given).logits
    assert float((logits - other).abs().max()) > 10 * TOLERANCE


def test_layers_that_are_given_the_last_token_of_a_query_alone() -> None:
    """Gemma 4 runs the layers with another's keys for the tokens whose logits are asked for."""
    model, (document, query) = build_tiny("gemma4_text"), ordinary_ids()
    ids = torch.cat([document, query], dim=1)
    given: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(method="dense"))
    assert engine.generate(document, query, **given).tolist() == expected[:, ids.shape[1] :].tolist()


def test_what_the_probe_finds() -> None:
    layers = {family: probe_model(build_model(family)) for family in HYBRIDS}
    assert [layer.window for layer in layers["gemma3"]] == [WINDOW, WINDOW, None, WINDOW]
    assert {layer.softcap for layer in layers["gemma2"]} == {6.0}
    assert [(layer.stores, layer.window) for layer in layers["gemma3n"]] == [
        (True, WINDOW),
        (True, None),
        (False, WINDOW),
        (False, None),
    ]
    latent = layers["deepseek_v3"][0]
    assert (latent.head_dim, latent.value_dim, latent.stores_attended) == (24, 16, False)
    unbound = build_model("mistral_window")
    unbound.config.max_position_embeddings = WINDOW
    assert {layer.window for layer in probe_model(unbound)} == {None}, "no request can be longer than the window"


def test_a_layer_whose_window_is_not_passed_on_is_refused() -> None:
    model = build_model("gemma3")
    model.model.layers[1].self_attn.sliding_window = None
    with pytest.raises(ValueError, match="layer 1, is a sliding-window layer but passes no window"):
        apb_ds.init_inference(model, apb_ds.APBConfig())


def test_a_layer_that_caches_nothing_is_refused() -> None:
    model = build_model("llama")
    forward = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **given: forward(
        *args, **{**given, "past_key_values": None}
    )
    with pytest.raises(ValueError, match="layer 1, updates its cache 0 times"):
        apb_ds.init_inference(model, apb_ds.APBConfig())


@pytest.mark.parametrize("family", ["gemma3", "gemma3n"])
def test_layers_with_windows_store_no_more_than_these_reach(family: str) -> None:
    document, query = request_ids(400, 6)
    engine = new_engine(family, hosts=4)
    context = engine.prefill(document, query)
    stored = [
        layer.local_length
        for layer, attention in zip(context.cache.layers, engine.layers, strict=True)
        if attention.stores
    ]
    assert stored == [WINDOW - 1 if layer.window else 400 for layer in engine.layers if layer.stores]
    windows = [layer for layer in context.cache.layers if isinstance(layer, WindowCacheLayer) and layer.is_initialized]
    full = context.cache.layer(1 if family == "gemma3n" else 2)
    assert all(layer.num_bytes < full.num_bytes for layer in windows)


def test_turns_that_are_kept_leave_no_more_behind() -> None:
    """What a window has left behind is dropped before the next turn, and a turn that is not kept loses nothing."""
    document, query = request_ids(150, 30)
    engine, judge = new_engine("gemma3", hosts=4), build_model("gemma3")
    context = engine.prefill(document, query)
    before = engine.query_logits(query, context=context)
    engine.generate(query_ids=query, context=context, max_new_tokens=3, do_sample=False)
    assert torch.equal(engine.query_logits(query, context=context), before)
    kept = engine.generate(query_ids=query, context=context, max_new_tokens=3, do_sample=False, append=True)
    asked = query.flip(1)[:, :4]
    logits = engine.query_logits(asked, context=context)
    tail = torch.cat([query, kept, asked], dim=1)
    expected = run_reference(judge, document, tail, embedded_query=query, hosts=4).logits[:, -4:]
    assert float((logits - expected).abs().max()) < TOLERANCE
    assert context.cache.layer(0).local_length == WINDOW - 1 and context.cache.layer(2).local_length == 182


def test_a_prefill_ends_with_the_last_layer_that_stores_anything() -> None:
    engine = new_engine("gemma3n", hosts=4)
    calls: list[int] = []
    for layer_idx, layer in enumerate(engine.module.model.layers):
        layer.register_forward_pre_hook(lambda *_, layer_idx=layer_idx: calls.append(layer_idx))
    done: list[tuple[int, int]] = []
    engine.prefill(request_ids(100, 5)[0], progress=lambda *at: done.append(at))
    assert set(calls) == {0, 1} and done[-1] == (8, 8), "two layers in four rounds"


def test_a_kernel_without_windows_is_not_used_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUFlashKernel, "has_window", False)
    engine = new_engine("gemma3")
    assert engine.kernel_names["prefill (window)"] != "cpu_flash" == engine.kernel_names["prefill"]
    named = "layer 0 of Gemma3ForCausalLM: kernel='cpu_flash' does not fit: .*window"
    with pytest.raises(ValueError, match=named):
        new_engine("gemma3", kernel="cpu_flash")
    with pytest.raises(ValueError, match=named):
        engine.configure(apb_ds.APBConfig(kernel="cpu_flash"))


def test_retaining_heads_score_the_layers_that_see_all_tokens() -> None:
    given = {"hosts": 4, "anchor_length": 12, "passing_length": 5, "compressor": "retaining_heads"}
    case = Case("heads", 150, 5, given)
    document, query = case.ids()
    engine = engine_with_heads(build_model("gemma3"))
    engine.configure(apb_ds.APBConfig(**given))
    scored: list[int] = []
    score = type(engine.attention.compressor).score

    def noted(self: Any, states: Any) -> Tensor:
        scored.append(states.layer_idx)
        return score(self, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.attention.compressor), "score", noted)
        logits = engine.query_logits(query, context=engine.prefill(document, query))
    expected = run_reference(build_model("gemma3"), document, query, **case.reference_settings("gemma3")).logits
    assert float((logits - expected).abs().max()) < TOLERANCE
    assert set(scored) == {2}


def test_engines_that_are_made_at_once() -> None:
    """Each probe sees its own model."""
    families = ["gemma3", "gpt_oss", "llama", "mistral_window"] * 5
    found = {family: probe_model(build_model(family)) for family in families[:4]}
    given = [build_model(family) for family in families]
    with ThreadPoolExecutor(len(given)) as pool:
        assert list(pool.map(probe_model, given)) == [found[family] for family in families]


@pytest.mark.parametrize("value_dim", [8, 24])
def test_windows_over_values_of_another_width(value_dim: int) -> None:
    model = build_model("mistral_window")
    widths = {"in_features": 64, "out_features": 2 * value_dim, "bias": False}
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.v_proj = torch.nn.Linear(**widths)
        attention.o_proj = torch.nn.Linear(4 * value_dim, 64, bias=False)
        for linear in (attention.v_proj, attention.o_proj):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator) * linear.in_features**-0.5
        attention.forward = functools.partial(forward_with_wide_values, attention, value_dim)
    model.requires_grad_(False)
    document, query = request_ids(90, 6)
    expected = run_reference(model, document, query, hosts=1).logits
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=4))
    assert {layer.value_dim for layer in engine.layers} == {value_dim}
    logits = engine.query_logits(query, context=engine.prefill(document, query))
    assert float((logits - expected).abs().max()) < TOLERANCE


def forward_with_wide_values(
    attention: Any,
    value_dim: int,
    hidden_states: Tensor,
    position_embeddings: Any,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    tokens = hidden_states.shape[:-1]
    query, key = (project(hidden_states).view(*tokens, -1, 16) for project in (attention.q_proj, attention.k_proj))
    value = attention.v_proj(hidden_states).view(*tokens, -1, value_dim).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    output, _ = attend(attention, query, key, value, None, scaling=attention.scaling, sliding_window=WINDOW)
    return attention.o_proj(output.reshape(*tokens, -1)), None


class RecordingGroup(EmulatedGroup):
    """An emulated rank that tells when its layers send something."""

    def tell(self) -> None:
        """Called before each message."""

    def start_all_gather(self, tensor: Tensor, into: Tensor | None = None) -> PendingGather:
        self.tell()
        return super().start_all_gather(tensor, into)

    def start_shift(self, tensor: Tensor) -> PendingShift:
        self.tell()
        return super().start_shift(tensor)

    def share_heads(self, attend: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def sent(*states: Any) -> Tensor:
            self.tell()
            return attend(*states)

        return super().share_heads(sent)


@pytest.mark.parametrize("num_document", [203, 5])  # the last ranks of the second have no tokens
@pytest.mark.parametrize(
    "given",
    [
        {"hosts": 8, "hosts_per_round": 1},
        {"hosts": 8, "compressor": "query", "hosts_per_round": 1},
        {"method": "star", "hosts": 4},
        {"method": "ring"},
        {"method": "ulysses"},
    ],
    ids=str,
)
def test_every_layer_starts_the_next_ones_weights_behind_its_messages_and_before_it_attends(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], num_document: int
) -> None:
    events: list[str] = []
    weights: Any = SimpleNamespace(enter=lambda layer_idx: None, start_next=lambda: events.append("weights"))
    attend_causally = Tools.attend_causally

    def attend(self: Tools, *states: Any) -> Any:
        events.append("attention")
        return attend_causally(self, *states)

    def new_state(*arguments: Any, **keywords: Any) -> PrefillState:
        return PrefillState(*arguments, **{**keywords, "weights": weights})

    monkeypatch.setattr("apb_ds.engine.engine.PrefillState", new_state)
    monkeypatch.setattr(Tools, "attend_causally", attend)
    for rank in range(2):
        group = RecordingGroup(rank=rank, world_size=2)
        monkeypatch.setattr(group, "tell", lambda: events.append("message"))
        engine = APBEngine(build_model("gemma3"), apb_ds.APBConfig(**given), group)
        events.clear()
        context = engine.prefill(*request_ids(num_document, 3), progress=lambda *_: events.append("done"))
        layers = [layer.split() for layer in " ".join(events).split("done")]
        assert layers.pop() == [] and len(layers) == len(engine.layers) * len(context.plan.rounds)
        for number, layer in enumerate(layers):
            before, after = layer[: layer.index("weights")], layer[layer.index("weights") + 1 :]
            assert "weights" not in after and "attention" not in before, (number, layer)
            if given.get("method") == "ring" and engine.layers[number].window is None:
                assert before == ["message"], (number, layer)  # the first of those that go around
            else:
                assert "message" not in after, (number, layer)
        assert sum("message" in layer for layer in layers) >= len(layers) * 3 / 4, layers
