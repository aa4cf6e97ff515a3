"""Plans as tables over (n, H, W) and the settings of one request."""

from __future__ import annotations

import math
from typing import Any

import pytest

from apb_ds.config import APBConfig
from apb_ds.plan import Plan, plan_request, schedule_rounds, split_evenly

LENGTHS = [1, 2, 5, 7, 8, 9, 63, 64, 65, 1000, 7690, 130944]
HOSTS_AND_RANKS = [
    (1, 1),
    (2, 1),
    (2, 2),
    (3, 1),
    (3, 3),
    (4, 2),
    (6, 2),
    (6, 3),
    (8, 1),
    (8, 2),
    (8, 4),
    (8, 8),
    (16, 4),
]


def new_plan(n: int, q: int = 0, world_size: int = 1, **given: Any) -> Plan:
    return plan_request(APBConfig(**given), n, q, world_size)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("hosts", [1, 2, 3, 7, 8, 16])
def test_blocks_cover_the_document(n: int, hosts: int) -> None:
    plan = new_plan(n, hosts=hosts, anchor_length=0)
    assert [token for start, stop in plan.blocks for token in range(start, stop)] == list(range(n))
    assert plan.blocks == tuple((math.floor(h * n / hosts), math.floor((h + 1) * n / hosts)) for h in range(hosts))
    lengths = [plan.block_length(host) for host in range(hosts)]
    assert max(lengths) - min(lengths) <= 1 and max(lengths) == math.ceil(n / hosts)


def test_blocks_of_a_case_written_by_hand() -> None:
    assert new_plan(5, hosts=8, anchor_length=0).blocks == (
        (0, 0), (0, 1), (1, 1), (1, 2), (2, 3), (3, 3), (3, 4), (4, 5),
    )  # fmt: skip
    assert new_plan(10, hosts=4).blocks == ((0, 2), (2, 5), (5, 7), (7, 10))


@pytest.mark.parametrize("schedule", ["natural", "zigzag"])
@pytest.mark.parametrize("hosts, world_size", HOSTS_AND_RANKS)
def test_rounds_serve_each_host_once(hosts: int, world_size: int, schedule: str) -> None:
    rounds = schedule_rounds(hosts, world_size, schedule)
    assert len(rounds) == hosts // world_size
    # A passing block needs the hosts before it: those of earlier rounds, or of this one.
    for k, served in enumerate(rounds):
        assert sorted(host for hosts_of_rank in served for host in hosts_of_rank) == list(
            range(k * world_size, (k + 1) * world_size)
        )
    plan = new_plan(1000, world_size=world_size, hosts=hosts, schedule=schedule)
    assert plan.rounds == rounds
    for rank in range(world_size):
        expected = list(range(rank, hosts, world_size))
        if schedule == "zigzag":
            mirrored = range(world_size - 1 - rank, hosts, world_size)
            expected = [mirrored[k] if k % 2 else host for k, host in enumerate(expected)]
        assert list(plan.hosts_of(rank)) == expected
    assert sum(plan.shard_length(rank) for rank in range(world_size)) == 1000


def test_rounds_without_tokens_are_left_out() -> None:
    assert new_plan(5, hosts=8, anchor_length=0).rounds == (((1,),), ((3,),), ((4,),), ((6,),), ((7,),))
    assert new_plan(2, world_size=2, hosts=8, anchor_length=0).rounds == (((3,), (2,)), ((7,), (6,)))
    together = new_plan(2, world_size=2, hosts=8, anchor_length=0, hosts_per_round=2)
    assert together.rounds == (((3, 7), (2, 6)),), "turns are left out, not rounds alone"
    plan = new_plan(1200, world_size=3, hosts=99_999)
    assert len(plan.rounds) <= 1200 and sum(map(plan.shard_length, range(3))) == 1200
    assert all(any(plan.num_forward_tokens(rank, index) for rank in range(3)) for index in range(len(plan.rounds)))


def test_several_hosts_a_round() -> None:
    plan = new_plan(1000, world_size=2, hosts=8, hosts_per_round=2)
    assert plan.rounds == (((0, 3), (1, 2)), ((4, 7), (5, 6)))
    assert plan.served(1, 1) == (5, 6) and plan.hosts_of(0) == (0, 3, 4, 7)
    assert plan.num_forward_tokens(0, 1) == plan.block_length(4) + plan.block_length(7)
    uneven = schedule_rounds(6, 2, "natural", per_round=2)
    assert uneven == (((0, 2), (1, 3)), ((4,), (5,)))
    assert schedule_rounds(6, 1, "zigzag", per_round=100) == (((0, 1, 2, 3, 4, 5),),)
    for rounds in (plan.rounds, uneven):
        assert all(list(hosts) == sorted(hosts) for served in rounds for hosts in served)


@pytest.mark.parametrize(
    "hosts, world_size, forward_tokens, expected",
    [
        (8, 1, None, 1),
        (8, 2, None, 1),
        (8, 1, 1000, 1),  # a block of 1000 tokens fills a forward
        (8, 1, 1999, 1),
        (8, 1, 2000, 2),
        (8, 1, 999, 1),
        (8, 1, 100_000, 8),
        (8, 4, 1000, 2),
        (16, 4, 1000, 2),
        (16, 2, 2000, 4),
        (8, 8, 1000, 1),  # a rank has no more
    ],
)
def test_how_many_hosts_a_round_by_default(hosts: int, world_size: int, forward_tokens: Any, expected: int) -> None:
    config = APBConfig(hosts=hosts)
    assert len(plan_request(config, 8000, 5, world_size, forward_tokens).served(0, 0)) == expected
    one = plan_request(APBConfig(hosts=hosts, hosts_per_round=1), 8000, 5, world_size, forward_tokens)
    assert len(one.served(0, 0)) == 1, "what is asked for counts"


def test_two_hosts_a_round_even_out_ranks_within_it() -> None:
    """By tokens seen: one by one, zigzag evens out sums alone, and every round waits for its slowest rank."""

    def slowest(**given: Any) -> int:
        plan = new_plan(8192, world_size=4, hosts=8, **given)
        seen = [[sum(map(plan.num_seen, hosts)) for hosts in served] for served in plan.rounds]
        return sum(max(of_round) for of_round in seen)

    assert slowest(hosts_per_round=2) < 0.8 * slowest()


def test_zigzag_evens_out_what_ranks_attend_to() -> None:
    plan = new_plan(8192, world_size=4, hosts=8)
    work = [sum(plan.kept_offsets[host] for host in plan.hosts_of(rank)) for rank in range(4)]
    natural = new_plan(8192, world_size=4, hosts=8, schedule="natural")
    uneven = [sum(natural.kept_offsets[host] for host in natural.hosts_of(rank)) for rank in range(4)]
    assert max(work) - min(work) < (max(uneven) - min(uneven)) / 5


@pytest.mark.parametrize(
    "tokens, block, anchor, passing",
    [(32, 4, 1, 0.5), (64, 8, 2, 1), (128, 16, 4, 2), (256, 32, 8, 4), (512, 64, 8, 8)],
)
def test_defaults_are_the_published_settings(tokens: int, block: float, anchor: float, passing: float) -> None:
    plan = new_plan(tokens * 1024, 60)
    assert plan.hosts == 8 and not plan.exact
    assert (plan.block_length(0), plan.anchor_length, plan.passing_length) == (
        block * 1024,
        anchor * 1024,
        passing * 1024,
    )


SETTINGS: list[tuple[str, int, int, dict[str, Any], tuple[int, int, int, bool]]] = [
    # rule, n, q, given, (anchor, embedded, passing, exact); b = ceil(n/H)
    ("1: no anchor, query or not", 800, 40, {"anchor_length": 0, "query_in_anchor": True}, (0, 0, 13, False)),
    ("1: no anchor holds a query longer than a block", 800, 300, {"anchor_length": 0}, (0, 0, 13, False)),
    ("1: no anchor, one host", 800, 40, {"anchor_length": 0, "hosts": 1}, (0, 0, 800, True)),
    ("2: a quarter of a block, rounded up", 802, 4, {}, (26, 4, 13, False)),
    ("2: b counts the longest block", 801, 4, {}, (26, 4, 13, False)),
    ("2: at most 8192", 524288, 60, {"hosts": 4}, (8192, 60, 16384, False)),
    ("2: at least p + q", 800, 40, {}, (41, 40, 13, False)),
    ("2: p + q of a longer header", 800, 40, {"query_position": 24}, (64, 40, 13, False)),
    ("2: p + q with the query in the anchor only", 800, 40, {"query_in_anchor": False}, (25, 0, 13, False)),
    ("2: no query known, no p", 800, 0, {"query_position": 60}, (25, 0, 13, False)),
    ("2: block is |B_0|", 807, 4, {"anchor_length": "block"}, (100, 4, 13, False)),
    ("2: |B_0| of an empty block is no anchor", 5, 3, {"anchor_length": "block"}, (0, 0, 1, False)),
    ("3: one host", 800, 4, {"hosts": 1, "passing_length": 3}, (0, 0, 800, True)),
    ("3: anchor of a block, not yet", 800, 4, {"anchor_length": 100}, (100, 4, 13, False)),
    ("3: anchor of b where blocks differ", 801, 4, {"anchor_length": 101}, (101, 4, 13, False)),
    ("3: anchor beyond a block", 800, 4, {"anchor_length": 101, "passing_length": 0}, (0, 0, 100, True)),
    ("3: default anchor fills the block", 800, 99, {}, (100, 99, 13, False)),
    ("3: default anchor beyond a block", 800, 100, {}, (0, 0, 100, True)),
    ("3: before 4, an anchor beyond a block that cannot hold the query", 8, 40, {"anchor_length": 9}, (0, 0, 1, True)),
    ("4: the anchor just holds the query", 800, 40, {"anchor_length": 41}, (41, 40, 13, False)),
    ("4: without the query any will do", 800, 40, {"anchor_length": 1, "query_in_anchor": False}, (1, 0, 13, False)),
    ("4: no query known, any anchor will do", 800, 0, {"anchor_length": 1, "query_position": 7}, (1, 0, 13, False)),
    ("5: passing length as given, beyond the block too", 800, 4, {"passing_length": 700}, (25, 4, 700, False)),
    ("5: nothing passed", 800, 4, {"passing_length": 0}, (25, 4, 0, False)),
    ("5: default ratio 8, rounded up", 801, 4, {"hosts": 4}, (51, 4, 26, False)),
    ("5: ratio of one", 800, 4, {"compression_ratio": 1}, (25, 4, 100, False)),
    ("5: a ratio that is no integer", 800, 4, {"compression_ratio": 2.5}, (25, 4, 40, False)),
    ("star", 803, 40, {"method": "star"}, (100, 0, 0, False)),
]  # fmt: skip


@pytest.mark.parametrize("rule, n, q, given, expected", SETTINGS, ids=[row[0] for row in SETTINGS])
def test_settings_in_their_order(
    rule: str, n: int, q: int, given: dict[str, Any], expected: tuple[int, int, int, bool]
) -> None:
    plan = new_plan(n, q, **given)
    assert (plan.anchor_length, plan.anchor_query_length, plan.passing_length, plan.exact) == expected


@pytest.mark.parametrize("given, numbers", [({}, (40, 1, 40)), ({"query_position": 16}, (55, 16, 40))])
def test_an_anchor_that_cannot_hold_the_query(given: dict[str, Any], numbers: tuple[int, int, int]) -> None:
    anchor, position, query = numbers
    with pytest.raises(ValueError) as caught:
        new_plan(800, query, anchor_length=anchor, **given)
    message = str(caught.value)
    assert f"anchor_length={anchor}" in message and f"query_position={position}" in message
    assert f"{query} query tokens" in message and "query_in_anchor=false" in message


def test_a_block_anchor_that_cannot_hold_the_query() -> None:
    with pytest.raises(ValueError, match="anchor_length=100 cannot hold the query"):
        new_plan(800, 100, anchor_length="block")


@pytest.mark.parametrize("hosts, world_size, nearest", [(8, 3, 9), (2, 4, 4), (1, 2, 2), (6, 4, 8)])
def test_hosts_must_divide_over_the_ranks(hosts: int, world_size: int, nearest: int) -> None:
    with pytest.raises(ValueError) as caught:
        new_plan(100, world_size=world_size, hosts=hosts)
    assert f"hosts={hosts}" in str(caught.value) and f"({world_size})" in str(caught.value)
    assert f"use hosts={nearest}" in str(caught.value)


@pytest.mark.parametrize("n, q, named", [(0, 3, "document length=0"), (-1, 3, "document length"), (9, -1, "query")])
def test_lengths_that_cannot_be(n: int, q: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        new_plan(n, q)


def eligible_positions(plan: Plan, host: int) -> list[int]:
    """Positions of the host's block that the anchor does not hold, one by one."""
    in_anchor = range(plan.anchor_length - plan.anchor_query_length)
    return [position for position in range(*plan.blocks[host]) if position not in in_anchor]


@pytest.mark.parametrize(
    "n, q, given",
    [
        (800, 40, {}),
        (800, 0, {}),
        (800, 40, {"anchor_length": 100}),
        (800, 99, {"anchor_length": 100}),
        (800, 40, {"anchor_length": 100, "query_in_anchor": False}),
        (800, 40, {"method": "star", "passing_length": 7}),
        (801, 4, {"anchor_length": 101, "passing_length": 1000, "query_in_anchor": False}),
        (800, 40, {"anchor_length": 0, "passing_length": 1000}),
        (5, 3, {"anchor_length": 0, "passing_length": 2}),
        (13, 2, {"anchor_length": 2, "passing_length": 2, "query_in_anchor": False}),
        (800, 500, {}),
    ],
)
def test_kept_lengths_are_l_p_or_what_is_eligible(n: int, q: int, given: dict[str, Any]) -> None:
    plan = new_plan(n, q, **given)
    eligible = [eligible_positions(plan, host) for host in range(plan.hosts)]
    for host, positions in enumerate(eligible):
        assert plan.num_eligible(host) == len(positions)
        stop = plan.blocks[host][1]
        assert positions == list(range(stop - len(positions), stop)), "the eligible ones are the block's last"
    assert plan.kept_lengths == tuple(min(plan.passing_length, len(positions)) for positions in eligible)
    assert plan.kept_offsets == tuple(sum(plan.kept_lengths[:host]) for host in range(plan.hosts + 1))
    for host in range(plan.hosts):
        assert plan.is_passed_on(host) == (host + 1 < plan.hosts and plan.kept_lengths[host] > 0)


def test_where_the_query_sits_in_the_anchor() -> None:
    plan = new_plan(800, 40, query_position=24, anchor_length=90)
    assert plan.anchor_query_span == (24, 64)
    assert plan.eligible_start == 50


@pytest.mark.parametrize("hosts, world_size", HOSTS_AND_RANKS[1:])
@pytest.mark.parametrize("anchor_length", [0, 1, 3, 100])
def test_anchor_shares_are_contiguous_and_complete(hosts: int, world_size: int, anchor_length: int) -> None:
    plan = new_plan(2000, world_size=world_size, hosts=hosts, anchor_length=anchor_length)
    shares = [plan.anchor_share(rank, 0) for rank in range(world_size)]
    assert [token for start, stop in shares for token in range(start, stop)] == list(range(anchor_length))
    assert max(stop - start for start, stop in shares) == math.ceil(anchor_length / world_size)
    for rank in range(world_size):
        assert all(plan.anchor_share(rank, k) == (0, 0) for k in range(1, len(plan.rounds)))


def test_a_redundant_anchor_is_whole_on_every_rank_of_the_first_round() -> None:
    plan = new_plan(2000, world_size=2, hosts=8, anchor_length=30, shard_anchor=False)
    assert [plan.anchor_share(rank, 0) for rank in range(2)] == [(0, 30)] * 2
    assert plan.anchor_share(1, 1) == (0, 0)


@pytest.mark.parametrize("shard_anchor", [True, False])
@pytest.mark.parametrize("n", [3, 999])
@pytest.mark.parametrize("hosts, world_size", [(8, 1), (8, 2), (8, 4), (4, 4)])
def test_tokens_of_a_forward(n: int, hosts: int, world_size: int, shard_anchor: bool) -> None:
    plan = new_plan(n, 0, world_size, hosts=hosts, anchor_length=1, shard_anchor=shard_anchor)
    total = 0
    for rank in range(world_size):
        for k, served in enumerate(plan.rounds):
            anchor = plan.anchor_share(rank, k)
            tokens = plan.num_forward_tokens(rank, k)
            assert tokens == anchor[1] - anchor[0] + sum(map(plan.block_length, served[rank]))
            total += tokens
    assert total == n + plan.anchor_length * (1 if shard_anchor else world_size)


def test_a_rank_may_have_nothing_to_do() -> None:
    plan = new_plan(1, world_size=4, hosts=4, anchor_length=0)
    assert [plan.num_forward_tokens(rank, 0) for rank in range(4)] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "n, parts, spans", [(7, 2, ((0, 3), (3, 7))), (2, 3, ((0, 0), (0, 1), (1, 2))), (0, 1, ((0, 0),))]
)
def test_split_evenly(n: int, parts: int, spans: tuple[tuple[int, int], ...]) -> None:
    assert split_evenly(n, parts) == spans


def test_two_hosts_share_a_forward_only_where_both_are_short() -> None:
    def hosts_a_round(num_tokens: int) -> int:
        return len(plan_request(APBConfig(hosts=8), num_tokens, 0, 4, forward_tokens=16_384).served(0, 0))

    assert hosts_a_round(131_072) == 2
    assert hosts_a_round(8 * 32_768) == 2
    assert hosts_a_round(1_048_576) == 1, "an MLP's intermediate states of 256K tokens would take tens of GiB"
