"""Emulated ranks do exactly as many operations and send exactly as many bytes as real ones."""

from __future__ import annotations

from typing import Any

import pytest

from apb_ds.parallel.emulated import emulated_groups
from tests.flop_counting import run_prefill_counted
from tests.pool import Pools

KV_HEADS = 4  # ulysses splits them over the ranks
TOKENS = 101
APB: dict[str, Any] = {"method": "apb", "hosts": 4, "anchor_length": 12, "passing_length": 5}

pytestmark = pytest.mark.whole_weights("counts bytes")


def emulated(world_size: int, given: dict[str, Any], n: int = TOKENS, family: str = "llama") -> list[tuple[int, int]]:
    return [
        run_prefill_counted(group.rank, world_size, family, n, given, KV_HEADS, group)
        for group in emulated_groups(world_size)
    ]


def real(
    pool: Pools, world_size: int, given: dict[str, Any], n: int = TOKENS, family: str = "llama"
) -> list[tuple[int, int]]:
    return pool(world_size).run(run_prefill_counted, family, n, given, KV_HEADS, timeout=60)


@pytest.mark.parametrize("shard_anchor", [True, False])
@pytest.mark.parametrize("schedule", ["zigzag", "natural"])
def test_apb(pool: Pools, schedule: str, shard_anchor: bool) -> None:
    given = APB | {"schedule": schedule, "shard_anchor": shard_anchor}
    assert emulated(2, given) == real(pool, 2, given)


@pytest.mark.parametrize(
    ("world_size", "n", "given"),
    [
        (2, 101, APB | {"compressor": "query"}),
        (2, 101, APB | {"compressor": "retaining_heads"}),
        (2, 40, {"hosts": 4, "anchor_length": 11}),  # exact
        (2, 3, APB | {"anchor_length": 0, "passing_length": 1}),  # empty blocks
        (2, 101, {"method": "star", "hosts": 4, "shard_anchor": False}),
        (2, 101, {"method": "ring"}),
        (2, 101, {"method": "ulysses"}),
        (4, 101, APB | {"hosts": 8}),
        (4, 101, {"method": "ring"}),
        (4, 101, {"method": "ulysses"}),
    ],
)
def test_other_settings(pool: Pools, world_size: int, n: int, given: dict[str, Any]) -> None:
    assert emulated(world_size, given, n) == real(pool, world_size, given, n)


@pytest.mark.parametrize(
    ("world_size", "given"), [(2, APB), (4, APB | {"hosts": 8}), (2, {"method": "ring"}), (2, {"method": "ulysses"})]
)
def test_layers_with_windows(pool: Pools, world_size: int, given: dict[str, Any]) -> None:
    assert emulated(world_size, given, family="gemma3") == real(pool, world_size, given, family="gemma3")


@pytest.mark.parametrize(
    "changed",
    [{"hosts": 2}, {"schedule": "natural"}, {"shard_anchor": False}, {"passing_length": 6}, {"compressor": "knorm"}],
    ids=str,
)
def test_other_settings_give_other_counts(pool: Pools, changed: dict[str, Any]) -> None:
    assert emulated(2, APB | changed) != real(pool, 2, APB)


def test_another_order_of_ranks_gives_other_counts(pool: Pools) -> None:
    given = APB | {"schedule": "natural"}
    assert emulated(2, given)[::-1] != real(pool, 2, given)
