"""`attach` puts APB into an engine of DeepSpeed's own, `detach` takes it out again and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BatchEncoding,
    GenerationConfig,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)

import apb_ds
from apb_ds.hf.interface import IMPLEMENTATION
from tests.engine_cases import TOLERANCE
from tests.models import build_model, distinct_ids, phi3_switching, request_ids
from tests.reference import run_reference

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 4}
CONFIG = apb_ds.APBConfig(**GIVEN)
MODELS = {
    "llama": lambda: build_model("llama"),
    "dynamic_rope": lambda: build_model("dynamic_rope"),
    "longrope": phi3_switching,
}


def new_engine(model: Any) -> Any:
    return deepspeed.init_inference(model, dtype=torch.float32)


@pytest.fixture
def engine() -> Any:
    return new_engine(build_model("llama"))


def hooks_of(model: nn.Module) -> dict[str, int]:
    """How many hooks each module has, where it has any."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    counted = {name: sum(len(getattr(module, kind)) for kind in kinds) for name, module in model.named_modules()}
    return {name: count for name, count in counted.items() if count}


def assert_plain(model: Any) -> None:
    """Nothing of APB is in the model or in transformers."""
    assert hooks_of(model) == {}
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}
    assert IMPLEMENTATION not in AttentionInterface()
    assert IMPLEMENTATION not in AttentionMaskInterface()
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def dense_logits(model: Any, length: int = 90) -> torch.Tensor:
    return model(input_ids=distinct_ids(length), use_cache=False).logits


def apb_answer(engine: Any) -> torch.Tensor:
    return engine.generate(input_ids=distinct_ids(106), query_length=5, max_new_tokens=4, do_sample=False)


def test_the_old_engine_answers_as_apb(engine: Any) -> None:
    ids = distinct_ids(106)
    attached = apb_ds.attach(engine, CONFIG)
    alone = apb_ds.init_inference(build_model("llama"), CONFIG)
    expected = alone.generate(ids[:, :-5], ids[:, -5:], max_new_tokens=4, do_sample=False)
    for either in (engine, attached):
        answer = apb_answer(either)
        assert answer.dtype == torch.int64
        assert torch.equal(answer, torch.cat([ids, expected], dim=1))
    assert attached.stats.new_tokens == 4


def test_the_old_engine_takes_long_prompts(engine: Any) -> None:
    """Its own generate refuses more than max_out_tokens=1024."""
    ids = distinct_ids(1200)
    with pytest.raises(RuntimeError, match="exceeds maximum length"):
        engine.generate(input_ids=ids, max_new_tokens=1)
    apb_ds.attach(engine, CONFIG)
    answer = engine.generate(input_ids=ids, query_length=6, max_new_tokens=2, do_sample=False)
    assert answer.shape == (1, 1202)


def test_calls_that_were_there_before(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """By name, by position, as ``inputs`` and from a tokenizer: all are cut by the engine's `split`."""
    ids = distinct_ids(106)
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    attached = apb_ds.attach(engine, CONFIG, split={"min_document": 50, "last_ids": 5})
    expected = apb_answer(attached)
    encoded = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with caplog.at_level("WARNING", logger="apb_ds"):
        answers = [
            engine.generate(**encoded, **given),
            engine.generate(ids, **given),
            engine.generate(inputs=ids, **given),
            engine.generate(document_ids=ids, **given),
            attached.generate(input_ids=ids, generation_config=GenerationConfig(**given)),
        ]
        short = engine.generate(ids[:, :54], **given)
        engine.generate(ids[:, :20], **given)
    for answer in answers:
        assert torch.equal(answer, expected)
    told = [record.getMessage() for record in caplog.records]
    assert [("of 106 tokens the last 5 are" in line, "54 tokens has no document" in line) for line in told] == [
        (True, False),
        (False, True),
    ]
    # Without a document, everything is attended to.
    attached.detach()
    assert torch.equal(short, engine.generate(input_ids=ids[:, :54], **given))


def padded(rows: list[torch.Tensor], token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, (1, tokens) each, as a batch padded on the left, and its mask."""
    longest = max(row.shape[1] for row in rows)
    pairs = [(row, torch.full((1, longest - row.shape[1]), token)) for row in rows]
    masks = [torch.cat([torch.zeros_like(pad), torch.ones_like(row)], dim=1) for row, pad in pairs]
    return torch.cat([torch.cat([pad, row], dim=1) for row, pad in pairs]), torch.cat(masks)


@pytest.mark.parametrize("token", [7, 511], ids=["padding ends answers", "padding is a token of its own"])
def test_rows_are_padded_as_transformers_does_it(engine: Any, token: int) -> None:
    """Against transformers, with exact settings; rows end at an end token, or not at all."""
    ids = distinct_ids(150)
    rows = [ids[:, :90], ids[:, 90:103], ids[:, 103:150], ids[:, :1].expand(1, 2)]
    batch, mask = padded(rows, token)
    plain = build_model("llama")
    free = plain.generate(batch, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=token)
    given: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": [token, int(free[1, -6])]}
    if token != 7:  # else the first end token fills rows
        given |= {"eos_token_id": int(free[1, -6]), "pad_token_id": token}
    expected = plain.generate(batch, attention_mask=mask, **given)
    assert (expected[:, -1] == token).any() and (expected[:, -1] != token).any()
    exact = {"hosts": 4, "anchor_length": 0, "passing_length": 4096}
    apb_ds.attach(engine, exact, split={"min_document": 30, "last_ids": 5})
    assert torch.equal(engine.generate(batch, attention_mask=mask, **given), expected)
    assert torch.equal(engine.generate(input_ids=batch, attention_mask=mask.bool(), **given), expected)
    one = engine.generate(batch[1:2], attention_mask=mask[1:2], **given)
    assert torch.equal(one, expected[1:2, : one.shape[1]])
    if token != 7:  # then transformers, too, takes leading ones for padding
        assert torch.equal(plain.generate(batch, **given), expected)
        assert torch.equal(engine.generate(batch, **given), expected)


def test_the_query_of_every_row(engine: Any) -> None:
    attached = apb_ds.attach(engine, CONFIG)
    ids = distinct_ids(212)
    given: dict[str, Any] = {"query_length": 5, "max_new_tokens": 4, "do_sample": False}
    rows = [ids[:, :106], ids[:, 106:190]]
    batch, mask = padded(rows, 0)
    answers = engine.generate(batch, attention_mask=mask, **given)
    for row, answer in zip(rows, answers, strict=True):
        assert torch.equal(answer[-4:], attached.generate(row, **given)[0, -4:])


def test_a_row_that_fails_fails_the_call(engine: Any) -> None:
    apb_ds.attach(engine, CONFIG)
    ids = distinct_ids(40).view(2, 20)
    failing = LogitsProcessorList([lambda ids, scores: scores if ids[0, 0] == 0 else 1 / 0])
    with pytest.raises(ZeroDivisionError):
        engine.generate(ids, max_new_tokens=2, logits_processor=failing)


def test_engines_are_deepspeeds(engine: Any) -> None:
    attached = apb_ds.attach(engine, CONFIG)
    alone = apb_ds.init_inference(build_model("llama"), CONFIG)
    for apb_engine in (attached, alone):
        assert isinstance(apb_engine, deepspeed.InferenceEngine)
        assert isinstance(apb_engine, apb_ds.APBEngine)
    assert attached.module is engine.module
    # An engine inside its own model would make every traversal of modules endless.
    for apb_engine in (engine, attached, alone):
        assert not any(isinstance(module, deepspeed.InferenceEngine) for module in apb_engine.module.modules())
    assert not any(isinstance(value, nn.Module) for value in engine.module.__dict__.values())


@pytest.mark.parametrize("family", MODELS)
def test_outside_of_generate_the_model_is_plain_and_dense(family: str) -> None:
    expected = dense_logits(MODELS[family]())
    engine = new_engine(MODELS[family]())
    attached = apb_ds.attach(engine, CONFIG)
    for either in (engine, attached, attached.module):
        assert torch.equal(dense_logits(either), expected)
        apb_answer(attached)
        assert_plain(attached.module)
        assert torch.equal(dense_logits(either), expected)
    context = attached.prefill(distinct_ids(101), max_positions=106)
    attached.query_logits(distinct_ids(5), context=context)
    assert_plain(attached.module)
    assert torch.equal(dense_logits(attached), expected)


@pytest.mark.parametrize("family", MODELS)
def test_detach_restores(family: str) -> None:
    model = MODELS[family]()
    engine = new_engine(model)
    generate, names = engine.generate, set(engine.__dict__)
    before = {length: dense_logits(model, length) for length in (30, 90)}
    ids = distinct_ids(60)
    own = engine.generate(input_ids=ids, max_new_tokens=4, do_sample=False)

    attached = apb_ds.attach(engine, CONFIG)
    apb_answer(engine)
    assert apb_ds.detach(attached) is engine
    assert engine.generate == generate
    assert set(engine.__dict__) == names
    assert_plain(model)
    for length, logits in before.items():
        assert torch.equal(dense_logits(engine, length), logits)
    assert torch.equal(engine.generate(input_ids=ids, max_new_tokens=4, do_sample=False), own)
    assert apb_ds.detach(attached) is model  # a second time there is nothing to undo
    with pytest.raises(ValueError, match="InferenceEngine has no APB attached"):
        apb_ds.detach(engine)


def test_detach_takes_the_engine_that_was_attached_to(engine: Any) -> None:
    own = engine.generate
    apb_ds.attach(engine, CONFIG)
    assert apb_ds.detach(engine) is engine
    assert engine.generate == own


def test_detach_of_an_engine_made_alone_gives_the_model() -> None:
    model = build_model("llama")
    engine = apb_ds.init_inference(model, CONFIG)
    apb_answer(engine)
    assert apb_ds.detach(engine) is model
    assert_plain(model)


def test_attach_again_after_detach(engine: Any) -> None:
    attached = apb_ds.attach(engine, CONFIG)
    first = apb_answer(engine)
    attached.detach()
    other = apb_ds.attach(engine, apb_ds.APBConfig(hosts=2))
    other.configure(CONFIG)
    assert torch.equal(apb_answer(other), first)


@pytest.fixture
def failing_layer(engine: Any) -> Iterator[Any]:
    """An attached engine whose second layer fails, once."""
    attached = apb_ds.attach(engine, CONFIG)
    layer = engine.module.model.layers[1].mlp
    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ArithmeticError("this layer failed")

    handle = layer.register_forward_pre_hook(fail)
    yield attached, handle
    handle.remove()


@pytest.mark.parametrize("call", ["prefill", "query_logits", "generate"])
def test_a_forward_that_fails_leaves_the_model_plain(failing_layer: Any, call: str) -> None:
    attached, handle = failing_layer
    document, query = request_ids(101, 5)
    expected = dense_logits(build_model("llama"))
    context = None
    if call != "prefill":
        context = apb_ds.init_inference(build_model("llama"), CONFIG).prefill(document, query)
        context.engine = attached  # the same weights, in a model whose layers do not fail
    with pytest.raises(ArithmeticError, match="this layer failed"):
        if call == "prefill":
            attached.prefill(document, query)
        elif call == "query_logits":
            attached.query_logits(query, context=context)
        else:
            attached.generate(query_ids=query, context=context, append=True, max_new_tokens=3)
    handle.remove()
    assert_plain(attached.module)
    assert torch.equal(dense_logits(attached), expected)
    # Some layers had the new tokens already, others not.
    context = context or attached.prefill(document, query)
    assert context.num_cached == document.shape[1]
    logits = attached.query_logits(query, context=context)
    assert (
        float((logits - run_reference(build_model("llama"), document, query, **GIVEN).logits).abs().max()) < TOLERANCE
    )


def test_progress_that_fails_leaves_the_model_plain() -> None:
    engine = apb_ds.init_inference(MODELS["longrope"](), CONFIG)

    def fail(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.prefill(distinct_ids(101), progress=fail)
    assert_plain(engine.module)
    assert torch.equal(dense_logits(engine), dense_logits(MODELS["longrope"]()))


def test_apb_attention_outside_of_an_engine_is_refused() -> None:
    from apb_ds.hf.interface import attention_forward

    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="init_inference"):
        attention_forward(nn.Module(), states, states, states, None)


@pytest.mark.parametrize(
    "setting, named",
    [
        ({"tensor_parallel": SimpleNamespace(tp_size=2)}, "tp_size=2"),
        ({"replace_with_kernel_inject": True}, "replace_with_kernel_inject"),
        ({"enable_cuda_graph": True}, "enable_cuda_graph"),
    ],
)
def test_engines_that_cannot_be_attached_to(engine: Any, setting: dict[str, Any], named: str) -> None:
    own = engine.generate
    engine._config = SimpleNamespace(
        **{
            "tensor_parallel": engine._config.tensor_parallel,
            "replace_with_kernel_inject": False,
            "enable_cuda_graph": False,
            **setting,
        }
    )
    with pytest.raises(ValueError, match=named):
        apb_ds.attach(engine, CONFIG)
    assert engine.generate == own


def test_a_wrong_config_leaves_the_engine_alone(engine: Any) -> None:
    own = engine.generate
    with pytest.raises(ValueError, match="compressor"):
        apb_ds.attach(engine, apb_ds.APBConfig(compressor="windows"))
    assert engine.generate == own
    assert_plain(engine.module)


def test_what_is_no_engine_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM must be a deepspeed\.InferenceEngine"):
        apb_ds.attach(engine.module, CONFIG)
    with pytest.raises(ValueError, match=r"use apb_ds\.attach"):
        apb_ds.init_inference(engine, CONFIG)
    with pytest.raises(ValueError, match="APBEngine already"):
        apb_ds.attach(apb_ds.attach(engine, CONFIG), CONFIG)


def test_a_second_attach_to_the_same_engine_is_refused(engine: Any) -> None:
    attached = apb_ds.attach(engine, CONFIG)
    with pytest.raises(ValueError, match="detach"):
        apb_ds.attach(engine, CONFIG)
    assert engine.generate == attached.generate
    assert isinstance(apb_ds.attach(attached.detach(), CONFIG), apb_ds.APBEngine)


def t5() -> nn.Module:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def pipeline() -> nn.Module:
    from deepspeed.runtime.pipe.module import PipelineModule

    return PipelineModule.__new__(PipelineModule)  # its own constructor needs a process group


@pytest.mark.parametrize(
    "build, named",
    [
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (pipeline, "PipelineModule"),
        (lambda: nn.Linear(2, 2), "model=Linear must be a transformers PreTrainedModel"),
    ],
    ids=["encoder-decoder", "pipeline", "no transformers model"],
)
def test_models_that_cannot_be_served(build: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        apb_ds.init_inference(build(), CONFIG)


def test_detach_restores_training_mode() -> None:
    model = build_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    engine = apb_ds.init_inference(model, CONFIG)
    assert not any(module.training for module in model.modules())
    engine.detach()
    assert [module.training for module in model.modules()] == before
    evaluates = apb_ds.init_inference(model.eval(), CONFIG)
    model.train()
    evaluates.detach()
    assert model.training  # what was switched on meanwhile stays on
