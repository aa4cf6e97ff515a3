"""transformers' text-generation pipeline with an engine as its model, against the same with the model itself."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

import apb_ds
from tests.models import build_model, distinct_ids
from tests.tiny_checkpoint import save_checkpoint

# Nothing in front, everything passed on: the answers are the plain model's.
EXACT: dict[str, Any] = {"hosts": 4, "anchor_length": 0, "passing_length": 4096}
SPLIT: dict[str, Any] = {"min_document": 40, "last_ids": 12}
LONG = "The grass is green, and the sky is blue.\n\nWhat is green, and what is blue?"
OTHER = "A harbour has two piers, and the crane is on the east pier. What is on the east pier?"
SHORT = "Hello"
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The pipeline of the model itself, that of an engine, and the engine."""
    directory = save_checkpoint(tmp_path_factory.mktemp("model"))
    pipes = []
    for wraps in (False, True):
        model, tokenizer = apb_ds.load_model(directory, device="cpu")
        tokenizer.pad_token = "<|user|>"
        engine = apb_ds.init_inference(model, EXACT, split=SPLIT) if wraps else model
        pipes.append(pipeline("text-generation", model=engine, tokenizer=tokenizer))
    return pipes[0], pipes[1], engine


@pytest.fixture
def plain(loaded: Any) -> Any:
    return loaded[0]


@pytest.fixture
def apb(loaded: Any) -> Any:
    return loaded[1]


CHAT = [{"role": "user", "content": LONG}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "The grass"}]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "a text": (LONG, GREEDY),
    "a short text": (SHORT, GREEDY),
    "texts": ([LONG, SHORT, OTHER], GREEDY),
    "a batch": ([LONG, SHORT, OTHER], {**GREEDY, "batch_size": 3}),
    "batches": ([LONG, SHORT, OTHER], {**GREEDY, "batch_size": 2, "return_full_text": False}),
    "a chat": (CHAT, GREEDY),
    "chats": ([CHAT, [{"role": "user", "content": SHORT}]], {**GREEDY, "batch_size": 2}),
    "an answer begun": (PREFILLED, GREEDY),
    "the answer alone": (LONG, {**GREEDY, "return_full_text": False}),
    "ids": (LONG, {**GREEDY, "return_tensors": True}),
    "a stop text": (LONG, {"max_new_tokens": 30, "do_sample": False, "stop_sequence": "e"}),
    "a length": (LONG, {"max_length": 80, "max_new_tokens": None, "do_sample": False}),
    "a config": (LONG, {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.5)}),
    "sampled": (LONG, {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_k": 20}),
    "sampled, short": (SHORT, {"max_new_tokens": 12, "do_sample": True}),
    "defaults": (OTHER, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_models_own(plain: Any, apb: Any, case: str) -> None:
    given, arguments = CASES[case]
    answers = []
    for pipe in (plain, apb):
        torch.manual_seed(3)
        answers.append(pipe(given, **arguments))
    assert answers[1] == answers[0]
    assert answers[0] != plain("?", **GREEDY)


def test_a_document_is_prefilled_over_the_hosts(apb: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the answers above do not show: exact settings and a plain model answer alike."""
    engine, lengths = loaded[2], []
    run = apb_ds.APBEngine._run_prefill

    def watched(self: Any, request: Any, *rest: Any) -> Any:
        lengths.append((request.document_ids.shape[1], request.plan.hosts, request.query_ids.shape[1]))
        return run(self, request, *rest)

    monkeypatch.setattr(apb_ds.APBEngine, "_run_prefill", watched)
    apb([LONG, OTHER, SHORT], batch_size=3, **GREEDY)
    assert lengths[:2] == [(len(text) - 12, engine.apb_config.hosts, 12) for text in (LONG, OTHER)]


def test_streaming(plain: Any, apb: Any) -> None:
    for text in (LONG, SHORT):
        streamer = TextIteratorStreamer(apb.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=apb, args=(text,), kwargs={**GREEDY, "streamer": streamer})
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        assert streamed == plain(text, return_full_text=False, **GREEDY)[0]["generated_text"]


def test_the_pipeline_learns_of_the_model(plain: Any, apb: Any, loaded: Any) -> None:
    engine = loaded[2]
    assert (apb.device, apb.dtype, apb.prefix) == (plain.device, torch.float32, plain.prefix)
    assert engine.can_generate() and engine.config is engine.module.config
    assert engine.generation_config is engine.module.generation_config
    assert repr(apb) == repr(plain).replace("LlamaForCausalLM", "APBEngine")
    with pytest.raises(AttributeError, match=r"'APBEngine' object has no attribute 'nothing'"):
        _ = engine.nothing


def test_the_pipeline_does_not_complain(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("ERROR", logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            pipeline("text-generation", model=loaded[2], tokenizer=loaded[1].tokenizer)
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.records == []


def test_an_assigned_generation_config_is_the_models() -> None:
    engine = apb_ds.init_inference(build_model("llama"), EXACT)
    engine.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert engine.module.generation_config.max_new_tokens == 3
    assert engine.generate(distinct_ids(30)).shape == (1, 33)


def test_a_pipeline_gains_apb_and_loses_it_again(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path)
    model, tokenizer = apb_ds.load_model(directory, device="cpu")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    before = pipe(LONG, **GREEDY)
    pipe.model = deepspeed.init_inference(model, dtype=torch.float32)
    attached = apb_ds.attach(pipe.model, {"hosts": 2, "anchor_length": 14, "passing_length": 2}, split=SPLIT)
    pipe.model = attached
    ids = tokenizer(LONG, return_tensors="pt").input_ids
    expected = attached.generate(ids[:, :-12], ids[:, -12:], **GREEDY)
    assert pipe(LONG, **GREEDY) == [{"generated_text": LONG + tokenizer.decode(expected[0], skip_special_tokens=True)}]
    assert pipe(LONG, **GREEDY) != before
    pipe.model = apb_ds.detach(attached).module
    assert pipe(LONG, **GREEDY) == before


@pytest.mark.parametrize("given", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_what_the_engine_refuses_is_refused(apb: Any, given: dict[str, Any]) -> None:
    for texts in (LONG, SHORT, [LONG, SHORT]):
        with pytest.raises(ValueError, match=next(iter(given))):
            apb(texts, batch_size=2, **given)
