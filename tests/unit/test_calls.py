"""Calls of an engine and what surrounds them: threads, streamers, inference and training mode, callers' tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TextIteratorStreamer

import apb_ds
from apb_ds.hf import overrides
from apb_ds.hf.overrides import forward_override, overridden
from tests.models import build_model, request_ids

DOCUMENT, QUERY = request_ids(90, 6)
CONFIG = apb_ds.APBConfig(hosts=4, mlp_tile=4)
THREADS, TRIALS = 3, 4


def answer(engine: Any, document: Tensor = DOCUMENT) -> list[int]:
    return engine.generate(document, QUERY, max_new_tokens=4, do_sample=False)[0].tolist()


def state_of(model: Any) -> tuple[Any, ...]:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return model.config._attn_implementation, forwards, hooks, dict(overrides._dispatchers)


def run_together(works: list[Callable[[], Any]]) -> list[Any]:
    """Run functions in threads of their own; return what they return, or raise what one raised."""
    found: dict[int, Any] = {}

    def run(index: int, work: Callable[[], Any]) -> None:
        try:
            found[index] = [work() for _ in range(TRIALS)]
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index, work)) for index, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == len(works), "a thread hangs"
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return [found[index] for index in range(len(works))]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_threads_over_one_engine_each_get_their_answer(family: str) -> None:
    engine = apb_ds.init_inference(build_model(family), CONFIG)
    documents = [request_ids(80 + 7 * index, 6)[0] for index in range(THREADS)]
    expected = [answer(engine, document) for document in documents]
    before = state_of(engine.module)
    works = [lambda document=document: answer(engine, document) for document in documents]
    assert run_together(works) == [[tokens] * TRIALS for tokens in expected]
    assert state_of(engine.module) == before


def test_other_threads_keep_the_plain_model() -> None:
    """They run the model itself while an engine answers, with padding, which APB's attention has no place for."""
    engine = apb_ds.init_inference(build_model("llama"), CONFIG)
    padded, mask = torch.cat([QUERY, QUERY]), torch.ones(2, QUERY.shape[1], dtype=torch.int64)
    mask[1, :3] = 0

    def plain() -> Tensor:
        with torch.no_grad():
            return engine.module(padded, attention_mask=mask).logits

    tokens, logits = answer(engine), plain()
    before = state_of(engine.module)
    answers, plains, _ = run_together([lambda: answer(engine), plain, plain])
    assert answers == [tokens] * TRIALS
    assert all(torch.equal(each, logits) for each in plains)
    assert state_of(engine.module) == before


def test_two_engines_over_one_model() -> None:
    model = build_model("llama")
    engines = [apb_ds.init_inference(model, config) for config in (CONFIG, apb_ds.APBConfig(method="dense"))]
    expected = [answer(engine) for engine in engines]
    before = state_of(model)
    assert run_together([lambda engine=engine: answer(engine) for engine in engines]) == [
        [tokens] * TRIALS for tokens in expected
    ]
    assert state_of(model) == before


def test_overrides_that_overlap_in_time_leave_the_original() -> None:
    """The first to begin ends first, so that saving and restoring in turn would keep the second one's."""
    layer = nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    plain = layer(inputs)
    begun, ended = threading.Event(), threading.Event()
    seen: list[Tensor] = []

    def other() -> None:
        with overridden([forward_override(layer, lambda forward: lambda x: forward(x) * 3)]):
            begun.set()
            ended.wait(30)
            seen.append(layer(inputs))
        seen.append(layer(inputs))

    thread = threading.Thread(target=other)
    with overridden([forward_override(layer, lambda forward: lambda x: forward(x) * 2)]):
        thread.start()
        assert begun.wait(30)
        assert torch.equal(layer(inputs), plain * 2)
        with overridden([forward_override(layer, lambda forward: lambda x: forward(x) + 1)]):
            assert torch.equal(layer(inputs), plain * 2 + 1), "one within another"
    assert torch.equal(layer(inputs), plain)
    ended.set()
    thread.join()
    assert torch.equal(seen[0], plain * 3) and torch.equal(seen[1], plain)
    assert "forward" not in layer.__dict__ and not overrides._dispatchers


class Tokenizer:
    """Enough of a tokenizer for a streamer."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids)) + " "


def failing_processor(ids: Tensor, scores: Tensor) -> Tensor:
    raise ValueError("no")


@pytest.mark.parametrize(
    "arguments",
    [{"logits_processor": [failing_processor]}, {"num_beams": 2}, {"context": "none"}, {}],
    ids=["processor", "refused", "no context", "success"],
)
def test_a_streamers_reader_is_always_released(arguments: dict[str, Any]) -> None:
    engine = apb_ds.init_inference(build_model("llama"), CONFIG)
    streamer = TextIteratorStreamer(Tokenizer(), timeout=30)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(streamer))
    reader.start()
    given = {"document_ids": DOCUMENT, "query_ids": QUERY, "max_new_tokens": 3, "do_sample": False, **arguments}
    if arguments:
        with pytest.raises((ValueError, AttributeError)):
            engine.generate(**given, streamer=streamer)
    else:
        engine.generate(**given, streamer=streamer)
    reader.join(10)
    assert not reader.is_alive()


@contextmanager
def outside() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("first", "then"), [(torch.inference_mode, outside), (outside, torch.inference_mode)], ids=["prefill", "query"]
)
def test_a_context_crosses_inference_mode(first: Any, then: Any) -> None:
    engine = apb_ds.init_inference(build_model("llama"), CONFIG)
    expected = engine.query_logits(QUERY, context=engine.prefill(DOCUMENT))
    with first():
        context = engine.prefill(DOCUMENT.clone())
    with then():
        logits = engine.query_logits(QUERY.clone(), context=context)
        engine.generate(query_ids=QUERY.clone(), context=context, max_new_tokens=3, append=True)
    assert torch.equal(logits, expected)
    engine.generate(query_ids=QUERY, context=context, max_new_tokens=3, append=True)


def test_callers_may_change_their_tensors() -> None:
    engine = apb_ds.init_inference(build_model("llama"), CONFIG)

    def turns(spoil: bool) -> list[list[int]]:
        document, query = DOCUMENT.clone(), QUERY.clone()
        context = engine.prefill(document)
        found = []
        for _ in range(2):
            tokens = engine.generate(query_ids=query, context=context, max_new_tokens=4, do_sample=False, append=True)
            found.append(tokens[0].tolist())
            if spoil:
                tokens.zero_()
                document.zero_()
        return found

    assert turns(spoil=True) == turns(spoil=False)


def test_training_mode_holds_for_no_call() -> None:
    """With gradient checkpointing, layers in training mode take no cache: the document would be dropped."""
    engine = apb_ds.init_inference(build_model("llama"), CONFIG)
    expected = answer(engine)
    engine.module.gradient_checkpointing_enable()
    engine.module.train()
    engine.module.model.layers[1].eval()
    before = [module.training for module in engine.module.modules()]
    assert answer(engine) == expected
    assert [module.training for module in engine.module.modules()] == before
