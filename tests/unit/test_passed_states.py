"""What blocks see besides their own: messages put in place, and places in the cache of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import apb_ds
from apb_ds.cache import Owners, ShardedCacheLayer
from apb_ds.methods.passed import OwnStates, SentStates, _runs
from apb_ds.plan import Plan, plan_request

KV_HEADS, HEAD_DIM = 2, 4


def new_plan(n: int, world_size: int, **given: Any) -> Plan:
    return plan_request(apb_ds.APBConfig(query_in_anchor=False, **given), n, 0, world_size)


def spans_of(plan: Plan, round_index: int) -> list[tuple[int, int]]:
    hosts = [host for (host,) in plan.rounds[round_index]]
    starts = [plan.anchor_length + plan.kept_offsets[host] for host in hosts]
    return [
        (start, start + (plan.kept_lengths[host] if plan.is_passed_on(host) else 0))
        for start, host in zip(starts, hosts, strict=True)
    ]


@pytest.mark.parametrize("schedule", ["zigzag", "natural"])
@pytest.mark.parametrize("n", [96, 97, 101, 18, 5])
@pytest.mark.parametrize("given", [{"passing_length": 3}, {"passing_length": 3, "anchor_length": 0}, {}], ids=str)
def test_messages_are_put_where_they_belong(given: dict[str, Any], n: int, schedule: str) -> None:
    plan = new_plan(n, 4, hosts=8, schedule=schedule, **given)
    like = torch.zeros(1, KV_HEADS, 1, HEAD_DIM)
    generator = torch.Generator().manual_seed(n)
    states = SentStates(plan, like)
    states._buffer.zero_()
    expected = states._buffer.clone()
    for index in range(len(plan.rounds)):
        spans = spans_of(plan, index)
        longest = max(stop - start for start, stop in spans)
        everyone = torch.randn(4, 2, KV_HEADS, longest, HEAD_DIM, generator=generator)
        states.place_all(spans, everyone)
        for (start, stop), message in zip(spans, everyone, strict=True):
            expected[:, :, start:stop] = message[:, :, : stop - start]
    assert torch.equal(states._buffer, expected)


def test_full_messages_are_put_there_at_once() -> None:
    full = [(index * 5, index * 5 + 5) for index in range(4)]
    assert _runs(full, 5) == [[0, 1, 2, 3]]
    assert _runs(full[::-1], 5) == [[3, 2, 1, 0]]
    assert _runs([(0, 5), (5, 9), (9, 14), (14, 19)], 5) == [[0], [1], [2, 3]], "the second one is shorter"
    assert _runs([(0, 5), (5, 10), (10, 15), (15, 15)], 5) == [[0, 1, 2]], "the last one is passed to nobody"
    assert _runs([(0, 5), (20, 25), (5, 10)], 5) == [[0], [2], [1]]
    assert _runs([(0, 0), (0, 0)], 0) == []


def filled_layer(n: int) -> tuple[ShardedCacheLayer, Tensor, Tensor]:
    keys, values = torch.randn(2, 1, KV_HEADS, n, HEAD_DIM)
    layer = ShardedCacheLayer(Owners(0, 1))
    layer.reserve(n + 10)
    layer.store_block(keys, values)
    return layer, keys, values


def test_one_rank_keeps_places() -> None:
    n = 80
    plan = new_plan(n, 1, hosts=4, anchor_length=6, passing_length=3)
    layer, keys, values = filled_layer(n)
    states = OwnStates(plan, layer, keys)
    assert [part.shape[2] for part in states.first(0)] == [0, 0]
    anchor = torch.randn(1, KV_HEADS, 6, HEAD_DIM)
    states.keep_anchor(anchor, -anchor)
    places = [
        torch.tensor([[20 * host + 7, 20 * host + 8, 20 * host + 11]] * KV_HEADS) + head
        for host, head in [
            (0, 0),
            (1, torch.tensor([[0], [1]])),
        ]
    ]
    for host, chosen in enumerate(places):
        states.keep(chosen - 20 * host, 20 * host)
    for count in (3, 6, 8, 12):
        seen_keys, seen_values = states.first(count)
        assert seen_keys.shape == seen_values.shape == (1, KV_HEADS, count, HEAD_DIM)
        for head in range(KV_HEADS):
            rows = torch.cat(places, dim=1)[head]
            assert torch.equal(seen_keys[0, head], torch.cat([anchor[0, head], keys[0, head, rows]])[:count])
            assert torch.equal(seen_values[0, head], torch.cat([-anchor[0, head], values[0, head, rows]])[:count])


def test_where_everything_is_passed_nothing_is_copied() -> None:
    n = 80
    plan = new_plan(n, 1, hosts=4, anchor_length=0, passing_length=20)
    layer, keys, _ = filled_layer(n)
    states = OwnStates(plan, layer, keys)
    states.keep(torch.arange(20).expand(KV_HEADS, 20), 0)
    seen, _ = states.first(20)
    assert layer.keys is not None and seen.data_ptr() == layer.keys.data_ptr() and seen.shape[2] == 20
    partly = OwnStates(new_plan(n, 1, hosts=4, anchor_length=0, passing_length=19), layer, keys)
    partly.keep(torch.arange(19).expand(KV_HEADS, 19), 1)
    assert torch.equal(partly.first(19)[0], keys[:, :, 1:20])
