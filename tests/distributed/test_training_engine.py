"""APB in DeepSpeed's training engine, between its steps: training goes on to the bit, and nothing is converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import apb_ds
from tests.distributed.test_sharded_by_others import launched
from tests.models import llama, request_ids
from tests.pool import Pools

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 14, "passing_length": 5}
OPTIMIZER = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}
BF16 = {"bf16": {"enabled": True}}
NEVER, DETACHED, KEPT = "never", "detached after each answer", "attached all the time"


def training_engine(**settings: Any) -> Any:
    import deepspeed

    model = llama(attention_dropout=0.2).train().requires_grad_(True)
    if "bf16" in settings:
        model = model.bfloat16()
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": OPTIMIZER, **settings}
    return deepspeed.initialize(model=model, config=config)[0]


def train(rank: int, world_size: int, attached: str, settings: dict[str, Any]) -> tuple[list[float], list[Any], Any]:
    """Losses of three steps, this rank's weights and optimiser states after them, and what was answered between."""
    prompt = torch.cat(request_ids(203, 9), dim=1)
    with launched():
        engine = training_engine(**settings)
        own = engine.generate
        if attached == KEPT:
            apb_ds.attach(engine, GIVEN)
        torch.manual_seed(rank)
        losses, answers = [], []
        for step in range(3):
            ids = request_ids(60, 4, seed=world_size * step + rank)[0]
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
            if attached == DETACHED:
                apb_ds.attach(engine, GIVEN)
            if attached != NEVER:
                assert engine.module.training
                answers.append(engine.generate(prompt, query_length=9, max_new_tokens=3, do_sample=False)[0, 212:])
                assert engine.generate is not own
            if attached == DETACHED:
                assert apb_ds.detach(engine) is engine
                assert engine.generate == own and engine.module.training
    states = tree_leaves(engine.optimizer.state_dict())
    kept = [
        *(getattr(one, "ds_tensor", one) for one in engine.module.parameters()),
        *states,
    ]  # ZeRO-3: this rank's part
    return losses, [one.detach().clone() for one in kept if isinstance(one, torch.Tensor)], answers


CASES = {
    "ZeRO-0": (1, {}),
    "ZeRO-0, two ranks": (2, {}),
    "ZeRO-1, bfloat16": (2, {**BF16, "zero_optimization": {"stage": 1}}),
    "ZeRO-3": (2, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_to_the_bit(pool: Pools, case: str) -> None:
    world_size, settings = CASES[case]
    expected = pool(world_size).run(train, NEVER, settings)
    answers = []
    for attached in (DETACHED, KEPT):
        found = pool(world_size).run(train, attached, settings)
        for (losses, kept, answered), (expected_losses, expected_kept, _) in zip(found, expected, strict=True):
            assert losses == expected_losses
            assert len(kept) == len(expected_kept) > 30
            for one, other in zip(kept, expected_kept, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)
            answers.append(torch.stack(answered))
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def refuse(rank: int, world_size: int) -> list[str]:
    """What `attach` says about engines that it does not take, without a message to the others."""
    import deepspeed
    from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine

    messages = []
    with launched():
        offloads = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
        compiled = training_engine()
        compiled._is_compiled = True  # compiling takes long
        hybrid, pipe = (kind.__new__(kind) for kind in (DeepSpeedHybridEngine, PipelineEngine))
        inside = training_engine()
        for engine in (training_engine(**offloads), compiled, hybrid, pipe):
            with pytest.raises(ValueError) as raised:
                apb_ds.attach(engine, GIVEN)
            messages.append(str(raised.value))
        with pytest.raises(ValueError, match=r"use apb_ds\.attach"):
            apb_ds.init_inference(inside, GIVEN)
        with pytest.raises(ValueError, match="DeepSpeedEngine has no APB attached"):
            apb_ds.detach(inside)
        assert isinstance(inside, deepspeed.DeepSpeedEngine) and "generate" not in vars(inside)
    return messages


def test_engines_that_cannot_be_asked_are_refused(pool: Pools) -> None:
    for messages in pool(2).run(refuse):
        named = ["offload_param to cpu", "engine.compile()", "hybrid_engine", "PipelineEngine"]
        assert all(name in message for name, message in zip(named, messages, strict=True)), messages
