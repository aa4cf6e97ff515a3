"""The exact methods on one rank: the plain model's logits and tokens, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apb_ds
from apb_ds.config import EXACT_METHODS, APBConfig
from apb_ds.plan import plan_request
from tests import models
from tests.engine_cases import TOLERANCE
from tests.models import request_ids


def plain_logits(model: Any, document: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([document, query], dim=1)
    with torch.no_grad():
        return model(ids).logits[:, document.shape[1] :].float()


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("n", [1, 2, 37])
def test_logits_and_tokens_are_the_plain_models(method: str, n: int) -> None:
    model = models.llama()
    document, query = request_ids(n, 5)
    expected = plain_logits(model, document, query)
    ids = torch.cat([document, query], dim=1)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    engine = apb_ds.init_inference(model, APBConfig(method=method))
    context = engine.prefill(document, query)
    assert context.plan.exact
    assert torch.allclose(engine.query_logits(query, context=context), expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(engine.generate(document, query, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hosts", 8),
        ("anchor_length", 0),
        ("passing_length", 4),
        ("compression_ratio", 2),
        ("compressor", "window"),
        ("query_in_anchor", False),
        ("query_position", 1),
        ("schedule", "zigzag"),
        ("shard_anchor", True),
        ("seed", 0),
    ],
)
@pytest.mark.parametrize("method", EXACT_METHODS)
def test_settings_of_apb_are_refused(method: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* setting of apb and star; method={method}"):
        APBConfig(method=method, **{field: value})


def test_dense_is_for_one_rank() -> None:
    with pytest.raises(ValueError, match="method=dense runs on one rank, and there are 2; use method=ring"):
        plan_request(APBConfig(method="dense"), 10, 2, 2)


@pytest.mark.parametrize(("n", "world_size"), [(1, 1), (1, 4), (7, 2), (8, 2), (13, 4), (64, 4), (5, 3)])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_every_token_has_one_rank(method: str, n: int, world_size: int) -> None:
    plan = plan_request(APBConfig(method=method), n, 3, world_size)
    spans = [plan.blocks[host] for rank in range(world_size) for host in plan.hosts_of(rank)]
    assert sorted(token for start, stop in spans for token in range(start, stop)) == list(range(n))
    tokens = [plan.num_forward_tokens(rank, 0) for rank in range(world_size)]
    if method == "ulysses":
        assert set(tokens) == {-(-n // world_size)}
    else:
        assert sum(tokens) == n and max(tokens) - min(tokens) <= 2
        assert [plan.served(rank, 0) for rank in range(world_size)] == [
            (rank, 2 * world_size - 1 - rank) for rank in range(world_size)
        ]


def test_ring_work_is_even() -> None:
    """Pairs of query and key that each rank computes: equal up to a block's rounding."""
    plan = plan_request(APBConfig(method="ring"), 1600, 0, 4)
    work = []
    for rank in range(4):
        blocks = [plan.blocks[host] for host in plan.hosts_of(rank)]
        work.append(sum((start + 1 + stop) * (stop - start) // 2 for start, stop in blocks))
    assert max(work) - min(work) < 0.01 * max(work)
