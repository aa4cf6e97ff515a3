"""The comparison with the reference notices faults: an engine with one fault is far outside the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import apb_ds
from apb_ds.cache import ShardedCacheLayer
from apb_ds.methods.passed import OwnStates
from apb_ds.methods.state import PrefillState
from apb_ds.ops.selection import select_top
from apb_ds.plan import Plan
from tests.engine_cases import CASES, TOLERANCE, Case
from tests.heads import engine_with_heads
from tests.models import build_model
from tests.reference import run_reference

CASE_BY_NAME = {case.name: case for case in CASES}
Patch = pytest.MonkeyPatch


def one_passed_token_unseen(patch: Patch) -> None:
    first = OwnStates.first
    patch.setattr(OwnStates, "first", lambda self, num_tokens: first(self, max(0, num_tokens - 1)))


def first_anchor_token_unseen(patch: Patch) -> None:
    first = OwnStates.first

    def late(self: OwnStates, num_tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = first(self, num_tokens)
        return keys[:, :, 1:], values[:, :, 1:]

    patch.setattr(OwnStates, "first", late)


def worst_scores_kept(patch: Patch) -> None:
    patch.setattr("apb_ds.compressors.base.select_top", lambda scores, count: select_top(-scores, count))


def heads_share_a_selection(patch: Patch) -> None:
    def of_first_head(scores: Tensor, count: int) -> Tensor:
        return select_top(scores[:1].expand_as(scores).contiguous(), count)

    patch.setattr("apb_ds.compressors.base.select_top", of_first_head)


def _shift_eligible_start(patch: Patch, by: int) -> None:
    patch.setattr(Plan, "eligible_start", property(lambda self: self.anchor_length - self.anchor_query_length + by))


def first_eligible_token_left_out(patch: Patch) -> None:
    _shift_eligible_start(patch, 1)


def last_anchor_token_passed_too(patch: Patch) -> None:
    _shift_eligible_start(patch, -1)


def _change_round_inputs(patch: Patch, change: Callable[[Any, Tensor, Tensor], None]) -> None:
    from apb_ds.engine import prefill

    original = prefill.round_inputs

    def changed(state: Any, document_ids: Tensor, query_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        ids, positions = (tensor.clone() for tensor in original(state, document_ids, query_ids))
        change(state, ids, positions)
        return ids, positions

    patch.setattr(prefill, "round_inputs", changed)


def anchor_positions_off_by_one(patch: Patch) -> None:
    def change(state: Any, ids: Tensor, positions: Tensor) -> None:
        start, stop = state.anchor_share
        positions[:, : stop - start] += 1

    _change_round_inputs(patch, change)


def block_positions_off_by_one(patch: Patch) -> None:
    def change(state: Any, ids: Tensor, positions: Tensor) -> None:
        start, stop = state.anchor_share
        if state.hosts != (0,):
            positions[:, stop - start :] += 1

    _change_round_inputs(patch, change)


def query_turned_in_the_anchor(patch: Patch) -> None:
    def change(state: Any, ids: Tensor, positions: Tensor) -> None:
        start, stop = state.anchor_share
        first, last = state.plan.anchor_query_span
        if stop > start:
            ids[:, first:last] = ids[:, first:last].flip(1)

    _change_round_inputs(patch, change)


def _average(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, into: Tensor | None = None) -> Tensor:
    merged = (out_a + out_b) / 2
    return merged if into is None else into.copy_(merged)


def prefill_merges_without_lse(patch: Patch) -> None:
    patch.setattr("apb_ds.attention.merge_two", _average)


def query_merges_without_lse(patch: Patch) -> None:
    patch.setattr("apb_ds.methods.decode.merge_two", _average)


def _change_query_kernel(patch: Patch, change: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Have the query's attention call ``change(kernel, query, keys, values, causal, scale)`` for its kernel."""
    from apb_ds.methods import decode

    attend = decode._attend_shard

    def attend_changed(tools: Any, kernel: Any, *args: Any) -> tuple[Tensor, Tensor]:
        def changed(*inputs: Any, **_: Any) -> tuple[Tensor, Tensor]:
            return change(kernel, *inputs)

        kernels: Any = SimpleNamespace(prefill=changed, decode=changed)
        return attend(replace(tools, kernels=kernels), changed, *args)  # type: ignore[arg-type]

    patch.setattr(decode, "_attend_shard", attend_changed)


def query_sees_the_past_causally(patch: Patch) -> None:
    """As a causal mask aligned to the first key would have it: query i sees the first i + 1 keys of the past."""

    def change(kernel: Any, query: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> Any:
        num_new = query.shape[2]
        return kernel(query, keys[:, :, :num_new], values[:, :, :num_new], True, scale)

    _change_query_kernel(patch, change)


def query_sees_its_later_tokens(patch: Patch) -> None:
    def change(kernel: Any, query: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> Any:
        return kernel(query, keys, values, False, scale)

    _change_query_kernel(patch, change)


def first_token_cached_twice(patch: Patch) -> None:
    store = ShardedCacheLayer.store_block

    def store_more(self: ShardedCacheLayer, keys: Tensor, values: Tensor) -> None:
        if self.local_length == 0:
            store(self, keys[:, :, :1], values[:, :, :1])
        store(self, keys, values)

    patch.setattr(ShardedCacheLayer, "store_block", store_more)


def heads_see_values_first(patch: Patch) -> None:
    from apb_ds.hf.interface import PROJECTIONS, projection_modules

    assert PROJECTIONS[0] == ("q_proj", "k_proj", "v_proj")
    patch.setattr("apb_ds.hf.interface.projection_modules", lambda module: projection_modules(module)[::-1])
    take = PrefillState.take_projections

    def rolled(self: PrefillState) -> list[tuple[Tensor, ...] | None]:
        return [None if kept is None else (torch.cat(kept, dim=-1).roll(32, dims=-1),) for kept in take(self)]

    patch.setattr(PrefillState, "take_projections", rolled)


def heads_of_another_layer(patch: Patch) -> None:
    from apb_ds.compressors.retaining_heads import RetainingHeads

    forward = RetainingHeads.forward
    patch.setattr(RetainingHeads, "forward", lambda self, layer_idx, states: forward(self, layer_idx + 1, states))


def heads_see_the_anchor_instead(patch: Patch) -> None:
    def take(self: PrefillState) -> list[tuple[Tensor, ...] | None]:
        parts, self.projections = self.projections, None
        if parts is None:
            return [None] * len(self.hosts)
        lengths = [self.plan.block_length(host) for host in self.hosts]
        return [tuple(part[:, :length] for part in parts) for length in lengths]

    patch.setattr(PrefillState, "take_projections", take)


def heads_are_not_pooled(patch: Patch) -> None:
    patch.setattr("apb_ds.compressors.retaining_heads.compressor.max_pool", lambda scores: scores)


FAULTS: list[tuple[Callable[[Patch], None], str]] = [
    (one_passed_token_unseen, "defaults"),
    (one_passed_token_unseen, "lengths divide"),
    (first_anchor_token_unseen, "lengths divide"),
    (worst_scores_kept, "keydiff"),
    (worst_scores_kept, "query"),
    (heads_share_a_selection, "keydiff"),
    (first_eligible_token_left_out, "passing beyond the block"),
    (last_anchor_token_passed_too, "passing beyond the block"),
    (anchor_positions_off_by_one, "lengths divide"),
    (block_positions_off_by_one, "lengths divide"),
    (query_turned_in_the_anchor, "query after a header"),
    (prefill_merges_without_lse, "lengths divide"),
    (query_merges_without_lse, "lengths divide"),
    (query_sees_the_past_causally, "exact, one host"),
    (query_sees_its_later_tokens, "exact, one host"),
    (first_token_cached_twice, "lengths divide"),
    (heads_see_values_first, "heads"),
    (heads_of_another_layer, "heads"),
    (heads_see_the_anchor_instead, "heads"),
    (heads_are_not_pooled, "heads"),
]


def difference(case: Case) -> float:
    """Return how far the engine's logits are from the reference's, the largest of them."""
    document, query = case.ids()
    engine = engine_with_heads(build_model("llama"))
    engine.configure(apb_ds.APBConfig(**case.given))
    logits = engine.query_logits(query, context=engine.prefill(document, query))
    expected = run_reference(build_model("llama"), document, query, **case.reference_settings()).logits
    return float((logits - expected).abs().max())


@pytest.mark.parametrize("name", sorted({name for _, name in FAULTS}))
def test_without_a_fault(name: str) -> None:
    assert difference(CASE_BY_NAME[name]) < TOLERANCE


@pytest.mark.parametrize(("fault", "name"), FAULTS, ids=[f"{fault.__name__}-{name}" for fault, name in FAULTS])
def test_a_fault_is_noticed(monkeypatch: Patch, fault: Callable[[Patch], None], name: str) -> None:
    fault(monkeypatch)
    found = difference(CASE_BY_NAME[name])
    assert found > 10 * TOLERANCE  # also false for nan, which would be noticed for another reason
