"""The group of an emulated rank: its own parts are real, bytes are counted as in a real group, only prefills run."""

from __future__ import annotations

import pytest
import torch

import apb_ds
from apb_ds.engine.engine import APBEngine
from apb_ds.parallel.emulated import EmulatedGroup, emulated_groups
from apb_ds.parallel.groups import SequenceGroup
from tests.models import build_model, request_ids


def test_a_gather_holds_the_ranks_part_and_random_parts_of_the_others() -> None:
    for group in emulated_groups(3):
        mine = torch.full((2, 5), float(group.rank))
        gathered = group.all_gather(mine)
        assert gathered.shape == (3, 2, 5) and gathered.dtype == mine.dtype
        others = [rank for rank in range(3) if rank != group.rank]
        assert torch.equal(gathered[group.rank], mine)
        assert not any(torch.equal(gathered[rank], mine) for rank in others)
        assert (group.bytes_sent, group.num_collectives) == (2 * 5 * 4 * 2, 1)


def test_each_gather_in_flight_holds_its_own_part() -> None:
    group = EmulatedGroup(rank=1, world_size=2)
    first, second = torch.zeros(4), torch.ones(4)
    pending = [group.start_all_gather(first), group.start_all_gather(second)]
    assert torch.equal(pending[0].wait()[1], first)
    assert torch.equal(pending[1].wait()[1], second)


def test_a_shift_returns_a_random_tensor_of_the_same_shape() -> None:
    group = EmulatedGroup(rank=0, world_size=4)
    sent = torch.zeros(3, 2, dtype=torch.bfloat16)
    received = group.start_shift(sent).wait()
    assert (received.shape, received.dtype) == (sent.shape, sent.dtype) and received.abs().sum() > 0
    assert group.bytes_sent == 3 * 2 * 2


def test_shared_heads_see_all_tokens_and_return_the_ranks() -> None:
    group = EmulatedGroup(rank=1, world_size=2)
    query, key, value = torch.ones(1, 3, 4, 8), 2 * torch.ones(1, 3, 2, 8), 3 * torch.ones(1, 3, 2, 8)
    seen = []

    def attend(*states: torch.Tensor) -> torch.Tensor:
        seen.extend(states)
        return 10 * states[0]

    output = group.share_heads(attend)(query, key, value)
    assert [tuple(states.shape) for states in seen] == [(1, 6, 2, 8), (1, 6, 1, 8), (1, 6, 1, 8)]
    for number, states in enumerate(seen, start=1):
        assert bool((states[:, 3:] == number).all()) and not bool((states[:, :3] == number).any())
    assert output.shape == query.shape and bool((output[:, :, 2:] == 10).all())
    assert group.bytes_sent == (2 * query.numel() + key.numel() + value.numel()) * 4 // 2


def test_queries_are_refused() -> None:
    engine = APBEngine(build_model("llama"), apb_ds.APBConfig(hosts=4), EmulatedGroup(rank=0, world_size=2))
    document, query = request_ids(101, 5)
    context = engine.prefill(document, query)
    with pytest.raises(RuntimeError, match="only runs prefills"):
        engine.query_logits(query, context=context)


def test_a_rank_beyond_the_group() -> None:
    with pytest.raises(ValueError, match="rank=2 must be below world_size=2"):
        EmulatedGroup(rank=2, world_size=2)
    with pytest.raises(ValueError, match="world_size=0"):
        EmulatedGroup(rank=0, world_size=0)


def test_weights_are_gathered_as_copies_and_answers_take_their_time() -> None:
    group = EmulatedGroup(world_size=4, copies=True)
    given = apb_ds.APBConfig(hosts=8, anchor_length=12, passing_length=5)
    engine = apb_ds.init_inference(build_model("llama"), given, group=group, shard_weights=True)
    assert engine.weights is not None
    document, query = request_ids(203, 5)
    before = group.bytes_sent
    context = engine.prefill(document, query)
    linears = [linear for layer in engine.weights.gatherer._layers.values() for linear in layer]
    gathered = len(context.plan.rounds) * sum(linear.weight.numel() * 4 * 3 for linear in linears)
    gathers = engine.weights.gatherer.group
    assert isinstance(gathers, EmulatedGroup)
    assert gathers.num_collectives == len(context.plan.rounds) * len(linears)
    assert engine.weights.num_gathered_bytes == gathered and context.bytes_sent == group.bytes_sent - before > gathered
    assert engine.generate(query_ids=query, context=context, max_new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_token_takes_five_collectives_a_layer_and_one_for_the_head(num_queries: int) -> None:
    """Of queries, keys and values; the ranks' results; their projection; gate and up; down. One token or a pack."""
    group = EmulatedGroup(world_size=4, copies=True)
    engine = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(hosts=4), group=group, shard_weights=True)
    queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(num_queries)]
    context = engine.prefill(request_ids(203, 5)[0])
    counts = []
    for num_new in (2, 5):
        before = group.num_collectives
        given = {"context": context, "max_new_tokens": num_new, "do_sample": False, "eos_token_id": None}
        engine.generate(query_ids=queries[0] if num_queries == 1 else queries, **given)
        counts.append(group.num_collectives - before)
    assert counts[1] - counts[0] == 3 * (5 * len(engine.layers) + 1)


def test_a_gather_of_copies() -> None:
    group = EmulatedGroup(rank=1, world_size=3, copies=True)
    mine, into = torch.arange(4).view(2, 2), torch.zeros(6, 2, dtype=torch.int64)
    expected = mine.expand(3, 2, 2)
    assert torch.equal(group.all_gather(mine), expected)
    assert torch.equal(group.start_all_gather(mine, into).wait(), expected) and torch.equal(into, mine.repeat(3, 1))
    assert torch.equal(group.broadcast(mine), mine)
    assert group.apart().all_gather(mine).shape == (3, 2, 2) and group.bytes_sent == 3 * 4 * 8 * 2


def test_cached_keys_do_not_depend_on_the_other_ranks() -> None:
    """In the first layer a rank caches what a single process caches for the same hosts."""
    document, query = request_ids(101, 5)
    config = apb_ds.APBConfig(hosts=4)
    alone = APBEngine(build_model("llama"), config, SequenceGroup())
    keys = alone.prefill(document, query).cache.layers[0].keys
    for group in emulated_groups(2):
        context = APBEngine(build_model("llama"), config, group).prefill(document, query)
        wanted = [slice(*context.plan.blocks[host]) for host in context.plan.hosts_of(group.rank)]
        expected = torch.cat([keys[:, :, span] for span in wanted], dim=2)
        torch.testing.assert_close(context.cache.layers[0].keys[:, :, : expected.shape[2]], expected)
