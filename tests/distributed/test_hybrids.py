"""Windows, sinks, capped logits, latents and shared keys on several ranks: with every method, never dependent on W."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from tests.engine_cases import TOLERANCE, Case, own_query_logits
from tests.models import HYBRIDS, WINDOW, build_model, request_ids
from tests.pool import Pools
from tests.reference import exact_logits, reference_greedy, run_reference

CASES = [
    Case("defaults", 203, 7),
    Case("blocks longer than the window", 190, 6, {"hosts": 4, "anchor_length": 47, "passing_length": 4}),
    Case("blocks shorter than the window", 90, 5, {"hosts": 16, "anchor_length": 3, "query_in_anchor": False}),
    Case("fewer tokens than ranks", 3, 4, {"anchor_length": 0, "passing_length": 1}),
    Case("query longer than the window", 90, 33, {"hosts": 4, "query_in_anchor": False}),
]
WAYS = [("zigzag", True, 1), ("natural", False, 3)]  # schedule, whether the anchor is sharded, hosts a round
NUM_NEW = 4


def answer_all(rank: int, world_size: int, family: str) -> dict[tuple[Any, ...], tuple[torch.Tensor, Any]]:
    """Return ``{(case, *way): (logits, tokens)}``, the logits as this rank computed them."""
    import apb_ds

    engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig())
    answers = {}
    for case, (schedule, shard_anchor, per_round) in itertools.product(CASES, WAYS):
        document, query = case.ids()
        way = {"schedule": schedule, "shard_anchor": shard_anchor, "hosts_per_round": per_round}
        engine.configure(apb_ds.APBConfig(**case.given, **way))
        context = engine.prefill(document, query)
        logits = own_query_logits(engine, query, context)
        tokens = engine.generate(query_ids=query, context=context, max_new_tokens=NUM_NEW, do_sample=False)
        answers[case.name, schedule] = (logits, tokens.tolist())
    return answers


@cache
def expected(family: str) -> list[tuple[torch.Tensor, Any]]:
    """Return the reference's logits and tokens of each case."""
    model, found = build_model(family), []
    for case in CASES:
        document, query = case.ids()
        logits = run_reference(model, document, query, **case.given).logits
        found.append((logits, reference_greedy(model, document, query, NUM_NEW, **case.given).tolist()))
    return found


@pytest.mark.parametrize(("family", "world_size"), [*zip(HYBRIDS, itertools.cycle([4, 2]), strict=False)])
def test_answers_are_the_references_on_every_rank(pool: Pools, family: str, world_size: int) -> None:
    by_rank = pool(world_size).run(answer_all, family, timeout=180)
    for case, (logits, tokens) in zip(CASES, expected(family), strict=True):
        for answers, (schedule, _, _) in itertools.product(by_rank, WAYS):
            own, found = answers[case.name, schedule]
            assert float((own - logits).abs().max()) < TOLERANCE, (case.name, schedule)
            assert found == tokens, (case.name, schedule)


def prefill_exactly(rank: int, world_size: int, families: list[str], method: str) -> dict[str, Any]:
    """Return the logits of an exact method, as this rank computed them, and what its windows' layers store."""
    import apb_ds
    from apb_ds.cache import WindowCacheLayer

    found = {}
    for family in families:
        engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(method=method))
        document, query = request_ids(131, 6)
        context = engine.prefill(document)
        stored = {
            layer.local_length
            for layer, attention in zip(context.cache.layers, engine.layers, strict=True)
            if isinstance(layer, WindowCacheLayer) and attention.stores
        }
        found[family] = own_query_logits(engine, query, context), stored
    return found


@pytest.mark.parametrize(("world_size", "method"), [(2, "ring"), (4, "ring"), (2, "ulysses")])
def test_exact_methods_are_the_plain_model(pool: Pools, world_size: int, method: str) -> None:
    by_rank = pool(world_size).run(prefill_exactly, list(HYBRIDS), method, timeout=180)
    document, query = request_ids(131, 6)
    for family in HYBRIDS:
        plain = exact_logits(build_model(family), torch.cat([document, query], dim=1))[:, -6:]
        for found in by_rank:
            logits, stored = found[family]
            assert float((logits - plain).abs().max()) < TOLERANCE, family
            assert stored <= {WINDOW - 1}, "every rank holds what the window still reaches, and no more"
