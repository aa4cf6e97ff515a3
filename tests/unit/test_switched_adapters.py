"""Peft adapters that are switched between requests: each answers from its own contexts, and from no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apb_ds
from apb_ds.hf.adapters import adapters_in_force
from tests.models import build_model, request_ids

peft = pytest.importorskip("peft")

ALL_PASSED = apb_ds.APBConfig(hosts=4, anchor_length=0, compression_ratio=1)
DOCUMENT, QUERY = request_ids(203, 9)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def adapted() -> Any:
    """A model with two adapters, the first one in force."""
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build_model("llama"), settings, adapter_name="first")
    model.add_adapter("second", settings)
    return model


def dense_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.cat([DOCUMENT, QUERY], dim=1)).logits[:, -QUERY.shape[1] :]
    return logits


def test_each_adapter_has_its_own_contexts(adapted: Any) -> None:
    engine = apb_ds.init_inference(adapted.get_base_model(), ALL_PASSED)
    contexts = {}
    for name in ("first", "second"):
        adapted.set_adapter(name)
        contexts[name] = engine.prefill(DOCUMENT, QUERY)
    for name in ("first", "second"):
        adapted.set_adapter(name)
        logits = engine.query_logits(QUERY, context=contexts[name])
        torch.testing.assert_close(logits, dense_logits(adapted), atol=2e-5, rtol=0)
    with adapted.disable_adapter():
        assert adapters_in_force(engine.module) == ()
        logits = engine.query_logits(QUERY, context=engine.prefill(DOCUMENT))
        torch.testing.assert_close(logits, dense_logits(adapted), atol=2e-5, rtol=0)
    adapted.merge_adapter(["second"])
    assert adapters_in_force(engine.module) == ("second",)


def test_contexts_of_another_adapter_are_refused(adapted: Any, tmp_path: Path) -> None:
    engine = apb_ds.init_inference(adapted.get_base_model(), ALL_PASSED)
    context = engine.prefill(DOCUMENT)
    context.save(tmp_path / "context")
    branch = context.branch()
    adapted.set_adapter("second")
    calls = (
        lambda: engine.query_logits(QUERY, context=context),
        lambda: engine.generate(query_ids=QUERY, context=context, **GREEDY),
        lambda: engine.generate(query_ids=QUERY, context=branch, **GREEDY),
        lambda: context.save(tmp_path / "again"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"prefilled with adapter 'first', .* now has adapter 'second'"):
            call()
    with pytest.raises(ValueError, match="another model: adapters is first in the saved context and second here"):
        engine.load_context(tmp_path / "context")
    with adapted.disable_adapter(), pytest.raises(ValueError, match="now has no adapter"):
        engine.query_logits(QUERY, context=context)
    adapted.set_adapter("first")
    loaded = engine.load_context(tmp_path / "context")
    answers = [engine.generate(query_ids=QUERY, context=one, **GREEDY) for one in (context, branch, loaded)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_a_batch_keeps_its_adapter(adapted: Any) -> None:
    engine = apb_ds.init_inference(adapted.get_base_model(), ALL_PASSED)
    alone = engine.generate(DOCUMENT, QUERY, **GREEDY)
    with engine.batch() as batch:
        handle = batch.submit(QUERY, context=engine.prefill(DOCUMENT, QUERY), **GREEDY)
        batch.step()
        adapted.set_adapter("second")
        for call in (batch.step, lambda: batch.prefill(DOCUMENT)):
            with pytest.raises(ValueError, match=r"1 requests with adapter 'first', .* now has adapter 'second'"):
                call()
        adapted.set_adapter("first")
        batch.run()
        assert torch.equal(handle.result(), alone)
        adapted.set_adapter("second")  # nothing is under way
        assert batch.prefill(DOCUMENT).adapters == ("second",)
