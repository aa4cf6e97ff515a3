"""Decode steps over fixed buffers, run as they would be recorded: the tokens, and when a recording is made anew."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import apb_ds
from apb_ds import cache
from apb_ds.cache import ShardedCacheLayer
from apb_ds.engine import cuda_graph
from apb_ds.engine.cuda_graph import DecodeStep, RecordedSteps, can_record
from apb_ds.ops.kernels.base import expand_kv_heads
from apb_ds.ops.kernels.torch_kernels import CPUFlashKernel
from tests.models import build_model, phi3, request_ids

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
NEW = 9
CPU = torch.device("cpu")


class Counts:
    """How many steps were recorded and run."""

    def __init__(self) -> None:
        self.recorded = 0
        self.run = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Have steps recorded on the CPU, where a recording is the step itself."""
    counts = Counts()
    run = DecodeStep.run

    def record(self: Any, model: nn.Module, cache: Any, call: Any) -> None:
        self.prepare(model, cache)
        counts.recorded += 1

    def run_as_it_is(self: Any, *arguments: Any) -> Any:
        counts.run += 1
        return run(self, *arguments)

    monkeypatch.setattr(CPUFlashKernel, "can_be_recorded", True)
    monkeypatch.setattr(DecodeStep, "warm_up", lambda *_: None)
    monkeypatch.setattr(DecodeStep, "record", record)
    monkeypatch.setattr(DecodeStep, "run", run_as_it_is)
    return counts


def new_engine(family: str = "llama", **given: Any) -> Any:
    return apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**{**GIVEN, "cuda_graph": True, **given}))


def answer(engine: Any, context: Any, num_new: int = NEW, **given: Any) -> list[int]:
    _, query = request_ids(101, 5)
    tokens = engine.generate(query_ids=query, context=context, max_new_tokens=num_new, do_sample=False, **given)
    return tokens[0].tolist()


def test_what_new_buffers_hold_changes_nothing(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel weighs whole tiles of a buffer, and what is behind the last key, which may be anything, with nothing."""

    def poisoned(self: Any, states: torch.Tensor, capacity: int) -> torch.Tensor:
        return states.new_full((*states.shape[:2], capacity, states.shape[3]), torch.nan)

    def weigh_whole_buffers(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_keys: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (expand_kv_heads(states, query.shape[1]) for states in (key, value))
        behind = torch.arange(key.shape[2]) >= num_keys
        logits = (query @ keys.transpose(-1, -2) * scale).masked_fill(behind, -torch.inf)
        return logits.softmax(dim=-1) @ values, logits.logsumexp(dim=-1)

    document, query = request_ids(101, 5)
    usual = new_engine(cuda_graph=False)
    expected = answer(usual, usual.prefill(document, query))
    monkeypatch.setattr(ShardedCacheLayer, "_buffer_like", poisoned)
    monkeypatch.setattr(CPUFlashKernel, "attend_first", weigh_whole_buffers)
    recording = new_engine()
    assert answer(recording, recording.prefill(document, query)) == expected
    assert counts.run > 0


def test_nan_that_was_left_behind_the_tokens_reaches_no_later_answer(
    counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier document's buffers, or a query that was dropped, may hold anything there."""
    document, query = request_ids(101, 5)
    usual, recording = new_engine(cuda_graph=False), new_engine()
    expected = answer(usual, usual.prefill(document, query))
    context = recording.prefill(document, query)
    assert answer(recording, context) == expected and counts.recorded == 1
    seen = []
    run = DecodeStep.run

    def look(self: Any, model: Any, cache: Any, *arguments: Any) -> Any:
        for buffer in cache.buffers():
            seen.append(bool(buffer[:, :, cache.local_lengths()[None] :].isfinite().all()))
        return run(self, model, cache, *arguments)

    for buffer in context.cache.buffers():
        buffer[:, :, context.cache.local_lengths()[None] :] = torch.nan
    monkeypatch.setattr(DecodeStep, "run", look)
    assert answer(recording, context) == expected
    assert seen and all(seen)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_tokens_are_the_same(family: str, counts: Counts) -> None:
    document, query = request_ids(101, 5)
    usual, recording = new_engine(family, cuda_graph=False), new_engine(family)
    expected = answer(usual, usual.prefill(document, query))
    assert counts.run == 0 and "recorded" not in usual.kernel_names
    context = recording.prefill(document, query)
    before = recording.query_logits(query, context=context)
    assert answer(recording, context) == expected
    # The first token comes with the query, and the next ones before it is worth recording.
    assert (counts.recorded, counts.run) == (1, NEW - cuda_graph.RECORD_AFTER)
    assert torch.equal(recording.query_logits(query, context=context), before), "the context is as it was"
    assert answer(recording, context) == expected
    assert (counts.recorded, counts.run) == (1, 2 * NEW - cuda_graph.RECORD_AFTER - 1), "at once, the second time"
    assert recording.kernel_names["recorded"] == "cpu_flash"


def test_the_next_document_takes_the_buffers_over(counts: Counts) -> None:
    usual, recording = new_engine(cuda_graph=False), new_engine()
    buffers = []
    for length in (101, 97, 108):
        document, query = request_ids(length, 5)
        context = recording.prefill(document, query)
        assert answer(recording, context) == answer(usual, usual.prefill(document, query))
        buffers.append(context.cache.buffers())
        del context
    assert counts.recorded == 1
    assert all(one is other for one, other in zip(buffers[0], buffers[2], strict=True))


def test_buffers_of_a_context_that_is_still_there_stay_its_own(counts: Counts) -> None:
    document, query = request_ids(101, 5)
    other = request_ids(103, 5, seed=1)[0]
    engine = new_engine()
    first = engine.prefill(document, query)
    expected = answer(engine, first)
    second = engine.prefill(other, query)
    assert not any(one is two for one, two in zip(first.cache.buffers(), second.cache.buffers(), strict=True))
    answer(engine, second)
    assert counts.recorded == 2
    assert answer(engine, first) == expected and counts.recorded == 3


def test_a_cache_of_another_size_frees_the_memory(counts: Counts) -> None:
    document, query = request_ids(101, 5)
    engine = new_engine()
    context = engine.prefill(document, query)
    answer(engine, context)
    buffer = weakref.ref(context.cache.buffers()[0])
    del context
    assert buffer() is not None, "kept for the next one"
    engine.prefill(request_ids(600, 5)[0], query)
    assert buffer() is None


def test_a_recording_outlives_settings_of_the_prefill(counts: Counts) -> None:
    """As an evaluation changes them with every sample."""
    document, query = request_ids(101, 5)
    engine = new_engine()
    answer(engine, engine.prefill(document, query))
    for changed in ({"query_position": 2}, {"compressor": "recent"}):
        engine.configure(apb_ds.APBConfig(**{**GIVEN, "cuda_graph": True, **changed}))
        usual = new_engine(cuda_graph=False, **changed)
        assert answer(engine, engine.prefill(document, query)) == answer(usual, usual.prefill(document, query))
    assert counts.recorded == 1
    engine.configure(apb_ds.APBConfig(**GIVEN, cuda_graph=True, fused=False))
    answer(engine, engine.prefill(document, query))
    assert counts.recorded == 2, "computed in another way"


def test_a_short_answer_records_nothing(counts: Counts) -> None:
    document, query = request_ids(101, 5)
    engine = new_engine()
    answer(engine, engine.prefill(document, query), cuda_graph.RECORD_AFTER)
    assert (counts.recorded, counts.run) == (0, 0)


def test_buffers_that_grow_are_recorded_anew(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "GROWTH_TOKENS", 1)
    monkeypatch.setattr(cache, "STEP_TOKENS", 4)
    document, query = request_ids(101, 5)
    usual, recording = new_engine(cuda_graph=False), new_engine()
    turns = []
    for engine in (usual, recording):
        context = engine.prefill(document, query)
        turns.append([answer(engine, context, append=True) for _ in range(3)])
    assert turns[0] == turns[1]
    assert counts.recorded > 1


def test_weights_that_moved_are_recorded_anew(counts: Counts) -> None:
    document, query = request_ids(101, 5)
    engine = new_engine()
    context = engine.prefill(document, query)
    expected = answer(engine, context)
    weight = engine.module.lm_head.weight
    weight.data = weight.data.clone()
    assert answer(engine, context) == expected
    assert counts.recorded == 2


def test_what_cannot_be_recorded_is_said_once(
    counts: Counts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(DecodeStep, "record", fail)
    document, query = request_ids(101, 5)
    usual, engine = new_engine(cuda_graph=False), new_engine()
    with caplog.at_level(logging.WARNING, logger="apb_ds"):
        contexts = [each.prefill(document, query) for each in (usual, engine)]
        tokens = [
            answer(each, context)
            for each, context in zip((usual, engine, engine), (*contexts, contexts[1]), strict=True)
        ]
    assert tokens[0] == tokens[1] == tokens[2] and counts.run == 0
    said = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(said) == 1 and "operation not permitted when stream is capturing" in said[0]


def test_when_steps_can_be_recorded(counts: Counts) -> None:
    engine = new_engine()
    kernels = [engine.attention.kernels_for(CPU, torch.float32, engine.layers[0].head_dim)]
    assert can_record(engine.module, kernels)
    longrope = phi3()
    assert not can_record(longrope, kernels), "its rotary embedding reads positions"


def test_no_kernel_on_cpu_can_be_recorded() -> None:
    engine = new_engine()
    assert (
        engine.apb_config.settings.cuda_graph
        and engine._recorded is None
        and set(engine.kernel_names) == {"prefill", "decode"}
    )
    assert RecordedSteps(engine.module, engine.group)._step is None


def test_a_destroyed_engine_holds_no_cache(counts: Counts) -> None:
    document, query = request_ids(101, 5)
    engine = new_engine()
    expected = answer(engine, engine.prefill(document, query))
    held = [weakref.ref(buffer) for buffer in engine._recorded._step.buffers]
    assert all(reference() is not None for reference in held)
    engine.destroy()
    engine.destroy()
    gc.collect()
    assert all(reference() is None for reference in held)
    assert answer(engine, engine.prefill(document, query)) == expected, "it still serves, and records no more"
    assert counts.recorded == 1


@pytest.mark.parametrize("has_recorded", [False, True])
def test_packs_read_a_document_once_with_the_kernel_of_recorded_steps(
    has_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It splits the keys of few queries, where the other kernels may leave most of the device idle."""
    calls: list[tuple[Any, torch.Size]] = []
    attend_all = CPUFlashKernel.attend_all

    def noted(self: Any, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append((self, query.shape))
        return attend_all(self, query, *arguments, **options)

    monkeypatch.setattr(CPUFlashKernel, "attend_all", noted)
    engine = new_engine(cuda_graph=False)
    document, query = request_ids(101, 5)
    context = engine.prefill(document, query)
    expected = answer(engine, context)
    kernels = engine.attention.kernels_for
    recorded = CPUFlashKernel()

    def with_recorded(*arguments: Any, **options: Any) -> Any:
        return replace(kernels(*arguments, **options), recorded=recorded if has_recorded else None)

    monkeypatch.setattr(engine.attention, "kernels_for", with_recorded)
    together = engine.generate(query_ids=[query, query], context=context, max_new_tokens=NEW, do_sample=False)
    assert [tokens[0].tolist() for tokens in together] == [expected, expected]
    config = engine.module.config
    assert len(calls) == (NEW - 1) * config.num_hidden_layers, "once a layer and step, both sequences together"
    assert {shape[1:3] for _, shape in calls} == {(config.num_attention_heads, 2)}
    assert all((kernel is recorded) == has_recorded for kernel, _ in calls)
