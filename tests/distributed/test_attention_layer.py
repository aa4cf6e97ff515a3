"""`APBAttention` in a hand-written decoder over 2 and 4 ranks, against the same decoder's dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.plain_decoder import Decoder, ask_by_hand, dense_logits, draw_ids, prefill_by_hand
from tests.pool import Pools

N, Q = 83, 6
EXACT: dict[str, Any] = {"hosts": 4, "anchor_length": 0, "passing_length": 21}
APPROXIMATE: dict[str, Any] = {"hosts": 4, "anchor_length": 7, "passing_length": 5, "compressor": "keydiff"}


def answer(rank: int, world_size: int, given: dict[str, Any]) -> tuple[torch.Tensor, int]:
    import apb_ds

    config = apb_ds.APBConfig(**given)
    group = torch.distributed.group.WORLD if world_size > 1 else None  # torch's own group will do
    attention = apb_ds.APBAttention(config, group)
    assert (attention.group.rank, attention.group.world_size) == (rank, world_size)
    decoder, document, query = Decoder().eval(), draw_ids(N, 1), draw_ids(Q, 2)
    cache = prefill_by_hand(decoder, attention, apb_ds.plan_request(config, N, 0, world_size), document)
    logits = ask_by_hand(decoder, attention, cache, query[:, :-1], apb_ds.Phase.QUERY)
    last = ask_by_hand(decoder, attention, cache, query[:, -1:], apb_ds.Phase.DECODE)
    return torch.cat([logits, last], dim=1), cache.local_lengths()[None]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("schedule", ["zigzag", "natural"])
def test_exact_setting_is_dense_attention(pool: Pools, world_size: int, schedule: str) -> None:
    expected = dense_logits(Decoder().eval(), torch.cat([draw_ids(N, 1), draw_ids(Q, 2)], dim=1))[:, N:]
    by_rank = pool(world_size).run(answer, {**EXACT, "schedule": schedule})
    assert sum(length for _, length in by_rank) == N + Q
    for logits, _ in by_rank:
        assert float((logits - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("shard_anchor", [True, False])
def test_approximate_setting_does_not_depend_on_the_ranks(pool: Pools, shard_anchor: bool) -> None:
    given = {**APPROXIMATE, "shard_anchor": shard_anchor}
    expected, _ = answer(0, 1, given)
    for logits, _ in pool(2).run(answer, given):
        assert float((logits - expected).abs().max()) < 1e-4
