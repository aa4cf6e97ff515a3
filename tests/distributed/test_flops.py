"""Operations of a prefill over 2 and 4 ranks: what is counted for each is what each computes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.flop_counting import run_counted
from tests.pool import Pools

APB: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("method", "n", "given"),
    [
        ("ring", 101, {}),
        ("ring", 3, {}),
        ("ulysses", 101, {}),
        ("apb", 101, APB),
        ("apb", 101, APB | {"hosts": 8, "compressor": "query"}),
        ("apb", 101, APB | {"shard_anchor": False, "schedule": "natural"}),
        ("star", 101, {"hosts": 4, "shard_anchor": False}),
        ("apb", 40, {"hosts": 4, "anchor_length": 11}),
        ("apb with windows", 101, APB),
        ("ulysses with windows", 101, {}),
    ],
)
def test_as_every_rank_computes(pool: Pools, method: str, n: int, given: dict[str, Any], world_size: int) -> None:
    kv_heads = 4  # ulysses shares them over 4 ranks
    method, _, windows = method.partition(" ")
    family = "gemma3" if windows else "llama"
    check(pool(world_size).run(run_counted, family, n, {"method": method, **given}, kv_heads, timeout=60))


def count_sharded(rank: int, world_size: int) -> tuple[int, int, dict[str, Any] | None]:
    return run_counted(rank, world_size, "llama", 101, APB, shard_weights=True)


def test_with_sharded_weights(pool: Pools) -> None:
    """In a prefill each rank computes whole products, of a query its part of them."""
    check(pool(4).run(count_sharded))


def check(ended: list[tuple[int, int, dict[str, Any] | None]]) -> None:
    counted = ended[0][2]
    assert counted is not None and counted["total"] == sum(counted["parts"].values())
    assert counted["total"] == sum(prefilled for prefilled, _, _ in ended)
    assert counted["slowest_rank"] == max(prefilled for prefilled, _, _ in ended)
    assert counted["query"] == sum(asked for _, asked, _ in ended)
