"""Rotary frequencies stay in float32 where everything else is in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

import apb_ds
from apb_ds.parallel.groups import training_group
from apb_ds.training.config import TrainingConfig
from apb_ds.training.trainer import Trainer
from tests.models import build_model, request_ids

FAR = 1000


def half_weights(family: str) -> Any:
    """A model as loading makes one: weights in half precision, its buffers as they were."""
    model = build_model(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def frequencies(model: Any) -> list[Tensor]:
    return [module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_an_engine_keeps_them(family: str) -> None:
    model = half_weights(family)
    before = [freq.clone() for freq in frequencies(model)]
    engine = apb_ds.init_inference(model, apb_ds.APBConfig())
    assert engine.module.dtype == torch.bfloat16 and before
    assert all(freq.dtype == torch.float32 for freq in frequencies(model))
    assert all(map(torch.equal, frequencies(model), before))


def test_far_positions_are_the_plain_models() -> None:
    """Rounded to 8 bits, frequencies give other logits there: that would be noticed."""
    document, query = request_ids(FAR, 7)
    everything = torch.cat([document, query], dim=1)
    with torch.no_grad():
        expected = half_weights("llama")(everything, logits_to_keep=7).logits.float()
        rough = half_weights("llama").bfloat16()(everything, logits_to_keep=7).logits.float()
    engine = apb_ds.init_inference(half_weights("llama"), apb_ds.APBConfig(method="dense"))
    actual = engine.query_logits(query, context=engine.prefill(document, query))
    error, rough_error = (float((logits - expected).norm() / expected.norm()) for logits in (actual, rough))
    assert error < 0.03
    assert rough_error > 3 * error, "what would be noticed"


def test_training_keeps_them(tmp_path: Path) -> None:
    """DeepSpeed's training engine does that by itself, unlike its inference engine."""
    model = half_weights("llama").requires_grad_(True)
    before = [freq.clone() for freq in frequencies(model)]
    training_group(60.0)
    Trainer(model, TrainingConfig(output="x", steps=2, warmup_steps=0), torch.bfloat16, tmp_path)
    assert all(map(torch.equal, frequencies(model), before))


def test_a_model_that_was_converted_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = half_weights("llama")
    engine = deepspeed.init_inference(model, dtype=torch.bfloat16)
    assert not caplog.records or "rotary" not in caplog.text
    apb_ds.attach(engine, apb_ds.APBConfig())
    assert caplog.text.count("rotary frequencies are bfloat16") == 1
