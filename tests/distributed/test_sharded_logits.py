"""Sharded weights compute what whole ones do, in bfloat16 to the bit, and a fault in them is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import apb_ds
from apb_ds.engine import prefill
from apb_ds.weights.gatherer import Gatherer
from apb_ds.weights.layers import JointLinears
from tests.engine_cases import TOLERANCE
from tests.models import build_model, llama, qwen2, request_ids
from tests.pool import Pools, RankTimeout

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
IDLE: dict[str, Any] = {"hosts": 8, "anchor_length": 0, "passing_length": 1, "schedule": "natural"}
FOUR_LAYERS, TIED = "llama of four layers", "qwen2 tied and of odd sizes"
# Of layers without biases, with biases, tied and padded, fused, and with windows.
KINDS = FOUR_LAYERS, "qwen2", TIED, "phi3", "gemma3"
OTHERS = "mistral", "yi", "qwen3", "gemma2", "gemma3n", "qwen2_vl", "gemma3_with_images"


# In float32 oneDNN, which whole weights alone use, sums in another order; see tests/engine_cases.py.
TOLERANCES = {torch.bfloat16: 0.0, torch.float32: TOLERANCE}

pytestmark = pytest.mark.whole_weights("compares sharded weights with whole ones")


def new_model(family: str) -> Any:
    if family == FOUR_LAYERS:
        return llama(num_hidden_layers=4)
    if family == TIED:
        return qwen2(vocab_size=515, intermediate_size=99, tie_word_embeddings=True)
    return build_model(family)


def logits(engine: Any, num_document: int) -> dict[str, Tensor]:
    """Logits of a query, and of one token and many behind its answer."""
    document, query = request_ids(num_document, 9)
    context = engine.prefill(document, query, max_positions=num_document + 80)
    found = {"query": engine.query_logits(query, context=context)}
    engine.generate(query_ids=query, context=context, append=True, max_new_tokens=4, do_sample=False)
    found["one token"] = engine.query_logits(request_ids(8, 1)[1], context=context)
    found["long query"] = engine.query_logits(request_ids(8, 40)[1], context=context)
    return found


def differing(
    rank: int,
    world_size: int,
    family: str,
    given: dict[str, Any] = GIVEN,
    num_document: int = 83,
    dtype: torch.dtype = torch.bfloat16,
    fault: Fault | None = None,
) -> list[str]:
    """Names of logits that sharded weights give otherwise than whole ones do on as many ranks."""
    config, tolerance = apb_ds.APBConfig(**given), TOLERANCES[dtype]
    expected = logits(apb_ds.init_inference(new_model(family).to(dtype), config), num_document)
    with Patch.context() as patch:
        if fault is not None:
            fault(patch)
        engine = apb_ds.init_inference(new_model(family).to(dtype), config, shard_weights=True)
        found = logits(engine, num_document)
    return [name for name in expected if not (expected[name] - found[name]).abs().max() <= tolerance]


@pytest.mark.parametrize(
    ("family", "world_size"),
    [(family, 4) for family in KINDS] + [(family, 2) for family in ("qwen2", *OTHERS)],
)
def test_logits_are_those_of_whole_weights_to_the_bit(pool: Pools, family: str, world_size: int) -> None:
    assert pool(world_size).run(differing, family) == [[]] * world_size


@pytest.mark.parametrize("family", KINDS)
def test_logits_in_float32(pool: Pools, family: str) -> None:
    assert pool(4).run(differing, family, GIVEN, 83, torch.float32) == [[]] * 4


def test_ranks_without_tokens(pool: Pools) -> None:
    assert pool(4).run(differing, FOUR_LAYERS, IDLE, 5) == [[]] * 4


def _change_computed(patch: Patch, change: Callable[[JointLinears], None]) -> None:
    original = JointLinears._compute

    def compute(self: JointLinears, states: Tensor) -> None:
        original(self, states)
        change(self)

    patch.setattr(JointLinears, "_compute", compute)


def gate_and_up_exchanged(patch: Patch) -> None:
    def change(joint: JointLinears) -> None:
        if len(joint._outputs) == 2:
            joint._outputs = {0: joint._outputs[1], 1: joint._outputs[0]}

    _change_computed(patch, change)


def biases_added_by_each_rank(patch: Patch) -> None:
    def change(joint: JointLinears) -> None:
        for number, linear in enumerate(joint._linears):
            if linear.bias is not None:
                joint._outputs[number] += (linear._group.world_size - 1) * linear.bias

    _change_computed(patch, change)


def _change_gathered(patch: Patch, change: Callable[[int, int, Tensor], Tensor]) -> None:
    """Have a layer, the first number, compute with another tensor for each of its weights, the second."""
    original = Gatherer.enter

    def enter(self: Gatherer, layer_idx: int) -> None:
        original(self, layer_idx)
        for number, linear in enumerate(self._layers[layer_idx]):
            assert linear.whole is not None
            linear.whole = change(layer_idx, number, linear.whole)

    patch.setattr(Gatherer, "enter", enter)


def gathered_parts_exchanged(patch: Patch) -> None:
    _change_gathered(patch, lambda layer_idx, number, whole: whole.roll(len(whole) // 2, 0))


def weights_left_in_a_buffer(patch: Patch) -> None:
    before: dict[tuple[int, int], Tensor] = {}

    def change(layer_idx: int, number: int, whole: Tensor) -> Tensor:
        before[layer_idx, number] = whole.clone()
        return before.get((layer_idx - 2, number), whole)

    _change_gathered(patch, change)


@pytest.mark.parametrize(
    ("fault", "family"),
    [
        (gate_and_up_exchanged, "llama"),
        (biases_added_by_each_rank, "qwen2"),
        (gathered_parts_exchanged, "phi3"),
        (weights_left_in_a_buffer, FOUR_LAYERS),
    ],
)
def test_a_fault_is_noticed(pool: Pools, fault: Fault, family: str) -> None:
    assert (
        pool(2).run(differing, family, GIVEN, 83, torch.bfloat16, fault) == [["query", "one token", "long query"]] * 2
    )


def gathers_not_joined(patch: Patch) -> None:
    original = prefill._join_round

    def join(model: Any, attention: Any, state: Any) -> None:
        state.weights = None
        original(model, attention, state)

    patch.setattr(prefill, "_join_round", join)


def test_a_gather_that_a_rank_without_tokens_does_not_join_is_noticed(pool: Pools) -> None:
    with pytest.raises(RankTimeout):
        pool(4).run(differing, FOUR_LAYERS, IDLE, 5, torch.bfloat16, gathers_not_joined, timeout=6)
