"""Weights that are sharded over the ranks: the tokens and logits of the plain model, and the bytes that each holds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.models import build_model, request_ids
from tests.pool import Pools

FAMILIES = ("llama", "qwen2", "phi3", "gemma3")
GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
SIZES = (203, 9)


def answer(rank: int, world_size: int, families: list[str], given: dict[str, Any]) -> dict[str, Any]:
    import apb_ds

    found = {}
    for family in families:
        model = build_model(family)
        whole = sum(parameter.numel() for parameter in model.parameters())
        engine = apb_ds.init_inference(model, apb_ds.APBConfig(**given), shard_weights=True)
        document, query = request_ids(*SIZES)
        tokens = engine.generate(document, query, max_new_tokens=6, do_sample=False)
        context = engine.prefill(document)
        queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(3)]
        alone = [engine.generate(query_ids=one, context=context, max_new_tokens=5, do_sample=False) for one in queries]
        together = engine.generate(query_ids=queries, context=context, max_new_tokens=5, do_sample=False)
        found[family] = {
            "tokens": tokens[0].tolist(),
            "alone": [one[0].tolist() for one in alone],
            "together": [one[0].tolist() for one in together],
            "held": sum(parameter.numel() for parameter in model.parameters()),
            "whole": whole,
            "is_gathering": engine._weights.gatherer.is_gathering,
        }
    return found


@cache
def expected(family: str) -> list[int]:
    import apb_ds

    document, query = request_ids(*SIZES)
    engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**GIVEN))
    return engine.generate(document, query, max_new_tokens=6, do_sample=False)[0].tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_weights_give_the_same_tokens(pool: Pools, world_size: int) -> None:
    ranks = pool(world_size).run(answer, list(FAMILIES), GIVEN, timeout=180)
    for found in ranks:
        for family in FAMILIES:
            of_family = found[family]
            assert of_family["tokens"] == expected(family)
            assert of_family["alone"] == of_family["together"]
            assert of_family["held"] < of_family["whole"] and not of_family["is_gathering"]
    assert ranks[0] == ranks[-1]
