"""Steps of packs as they would be recorded: the tokens, and when a recording is made anew or dropped."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

import apb_ds
from apb_ds.engine import packed_graphs
from apb_ds.engine.packed_graphs import PackedStep
from apb_ds.engine.packs import run_forward
from apb_ds.methods.packed import Pack
from apb_ds.ops.kernels.torch_kernels import CPUFlashKernel
from tests.models import build_model, request_ids

NEW = 9


class Counts:
    """How many steps were recorded and run."""

    def __init__(self) -> None:
        self.recorded = 0
        self.run = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Have steps recorded on the CPU, where a replay computes what the recorded tensors hold by then."""
    counts = Counts()

    def record(self: Any, engine: Any, pool: Any) -> None:
        counts.recorded += 1
        self.engine = weakref.ref(engine)

    def run(self: Any, rows: Any) -> torch.Tensor:
        counts.run += 1
        self._pack.replace(rows)
        return run_forward(self.engine(), self._pack)

    monkeypatch.setattr(CPUFlashKernel, "can_be_recorded", True)
    monkeypatch.setattr(packed_graphs, "_new_pool", mock.Mock())
    monkeypatch.setattr(Pack, "release", lambda self: None)
    monkeypatch.setattr(PackedStep, "warm_up", lambda *_: None)
    monkeypatch.setattr(PackedStep, "record", record)
    monkeypatch.setattr(PackedStep, "run", run)
    return counts


def new_engine(family: str = "llama", **given: Any) -> Any:
    given = {"hosts": 4, "anchor_length": 12, "passing_length": 5, "cuda_graph": True, **given}
    return apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**given))


def queries(number: int) -> list[torch.Tensor]:
    return [request_ids(20, 3 + index, seed=index)[1] for index in range(number)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n", "gpt_oss"])
def test_recorded_steps_give_the_tokens_of_one_at_a_time(family: str, counts: Counts) -> None:
    """Sequences of two documents end one after the other, so rows are padded and recordings change."""
    engine = new_engine(family)
    contexts = [engine.prefill(request_ids(n, 5, seed=n)[0], max_positions=n + 60) for n in (101, 70)]
    asked = [(contexts[index % 2], query, NEW + 6 * index) for index, query in enumerate(queries(5))]
    alone = [engine.generate(query_ids=query, context=context, max_new_tokens=n) for context, query, n in asked]
    with engine.batch() as batch:
        handles = [batch.submit(query, context=context, max_new_tokens=n) for context, query, n in asked]
        batch.run()
    assert [handle.tokens for handle in handles] == [tokens[0].tolist() for tokens in alone]
    assert counts.recorded > 1 and counts.run > counts.recorded


def test_expanded_latents_are_not_recorded(counts: Counts) -> None:
    """How much there is to expand changes with every token."""
    assert new_engine("deepseek_v3")._acceleration.packed is None


def test_a_recording_serves_the_next_sequences_of_its_documents(counts: Counts) -> None:
    engine = new_engine()
    context = engine.prefill(request_ids(101, 5)[0], max_positions=160)
    for _ in range(3):
        engine.generate(query_ids=queries(3), context=context, max_new_tokens=NEW)
    assert counts.recorded == 1, "three sequences are padded to four rows, as in the first batch"
    engine.generate(query_ids=queries(2), context=context, max_new_tokens=NEW)
    assert counts.recorded == 1, "four rows serve two sequences, too"
    engine.generate(query_ids=queries(5), context=context, max_new_tokens=NEW)
    engine.generate(query_ids=queries(1), context=context, max_new_tokens=NEW)
    assert counts.recorded == 3, "but not five, and would waste most of a step on one"


def test_a_recording_serves_one_document_after_another(counts: Counts) -> None:
    """Documents that nobody shares are copied to where a recording finds them."""
    engine = new_engine()
    asked = [(engine.prefill(request_ids(90 + n, 5, seed=n)[0]), query) for n, query in enumerate(queries(7))]
    lengths = [NEW + 3 * number for number in range(7)]
    alone = [
        engine.generate(query_ids=query, context=context, max_new_tokens=length)
        for (context, query), length in zip(asked, lengths, strict=True)
    ]
    handles = []
    with engine.batch() as batch:
        for (context, query), length in zip(asked, lengths, strict=True):
            handles.append(batch.submit(query, context=context, max_new_tokens=length))
            while len(batch) == 4:
                batch.step()
        batch.run()
    assert [handle.tokens for handle in handles] == [tokens[0].tolist() for tokens in alone]
    assert counts.recorded == 2 and counts.run > 20, "for four sequences, which serves two, and for a lone one"


def test_recordings_are_dropped_with_weights_and_documents(counts: Counts) -> None:
    engine = new_engine()
    context = engine.prefill(request_ids(101, 5)[0], max_positions=160)
    expected = engine.generate(query_ids=queries(2), context=context, max_new_tokens=NEW)
    weight = engine.module.lm_head.weight
    weight.data = weight.data.clone()
    again = engine.generate(query_ids=queries(2), context=context, max_new_tokens=NEW)
    assert counts.recorded == 2 and all(map(torch.equal, expected, again))
    cache = weakref.ref(context.cache)
    for step in engine._acceleration.packed._recordings.values():
        step._pack.members = step._pack.groups = []  # as `Pack.release`, which is replaced here, does
    del context
    gc.collect()
    assert cache() is None, "a recording must not keep a document alive"


def test_the_oldest_recording_makes_room(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_graphs, "MAX_RECORDINGS", 1)
    engine = new_engine()
    context = engine.prefill(request_ids(101, 5)[0], max_positions=160)
    for number, recorded in [(5, 1), (3, 1), (1, 2), (5, 3)]:
        engine.generate(query_ids=queries(number), context=context, max_new_tokens=NEW)
        assert counts.recorded == recorded


def test_a_step_that_cannot_be_recorded_runs_as_it_is(
    counts: Counts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(PackedStep, "record", fail)
    engine = new_engine()
    context = engine.prefill(request_ids(101, 5)[0], max_positions=160)
    together = engine.generate(query_ids=queries(2), context=context, max_new_tokens=NEW)
    alone = [engine.generate(query_ids=query, context=context, max_new_tokens=NEW) for query in queries(2)]
    assert all(map(torch.equal, alone, together)) and counts.run == 0
    assert caplog.text.count("without CUDA graphs") == 1
