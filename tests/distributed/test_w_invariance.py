"""Answers depend on H, l_a, l_p, the compressor and the model: never on W, nor on who computes what, and when."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.engine_cases import TOLERANCE, Case, own_query_logits
from tests.heads import engine_with_heads
from tests.models import build_model
from tests.pool import Pools
from tests.reference import reference_greedy, run_reference

NUM_NEW_TOKENS = 5
# schedule, whether the anchor is sharded, hosts a round
WAYS = [("zigzag", True, 1), ("zigzag", False, 2), ("natural", True, 1), ("natural", False, 3), ("zigzag", True, 8)]

CASES = [
    Case("defaults", 203, 7),
    Case("query compressor", 203, 7, {"compressor": "query", "anchor_length": 17, "passing_length": 5}),
    Case("keydiff, four hosts", 110, 3, {"hosts": 4, "compressor": "keydiff", "passing_length": 6}),
    Case("random", 110, 3, {"hosts": 4, "compressor": "random", "anchor_length": 11, "passing_length": 6}),
    Case("heads", 110, 3, {"hosts": 4, "compressor": "retaining_heads", "passing_length": 6}),
    Case("heads and window", 110, 3, {"hosts": 4, "compressor": "heads_and_window", "passing_length": 6}),
    Case("no anchor", 91, 5, {"anchor_length": 0, "passing_length": 4, "compressor": "knorm"}),
    Case("anchor shorter than ranks", 91, 5, {"anchor_length": 2, "query_in_anchor": False, "compressor": "recent"}),
    Case("nothing passed", 91, 2, {"method": "star"}),
    Case("passing beyond the block", 91, 2, {"passing_length": 40, "anchor_length": 5}),
    Case("fewer tokens than hosts", 5, 4, {"anchor_length": 0, "passing_length": 1}),
    Case("few tokens, many hosts, one of anchor", 3, 4, {"hosts": 96, "anchor_length": 1, "query_in_anchor": False}),
    Case("exact", 60, 9),
    Case("exact, fewer tokens than ranks", 2, 3),
]


def answer_all(rank: int, world_size: int, family: str) -> dict[tuple[str, str, bool, int], tuple[torch.Tensor, Any]]:
    """Return ``{(case, *way): (logits, tokens)}``, the logits as this rank computed them."""
    import apb_ds

    engine = engine_with_heads(build_model(family))
    answers = {}
    for case, (schedule, shard_anchor, per_round) in itertools.product(CASES, WAYS):
        document, query = case.ids()
        way = {"schedule": schedule, "shard_anchor": shard_anchor, "hosts_per_round": per_round}
        engine.configure(apb_ds.APBConfig(**case.given, **way))
        context = engine.prefill(document, query)
        logits = own_query_logits(engine, query, context)
        tokens = engine.generate(document, query, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        answers[case.name, schedule, shard_anchor, per_round] = (logits, tokens.tolist())
    return answers


def _expected(case: Case, family: str) -> tuple[torch.Tensor, Any]:
    model = build_model(family)
    document, query = case.ids()
    settings = case.reference_settings(family)
    if settings.pop("method", None) == "star":
        settings.update(anchor_length="block", passing_length=0, query_in_anchor=False)
    logits = run_reference(model, document, query, **settings).logits
    return logits, reference_greedy(model, document, query, NUM_NEW_TOKENS, **settings).tolist()


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[torch.Tensor, Any]]:
    return {case.name: _expected(case, "qwen2") for case in CASES}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_answers_are_the_reference_on_every_rank(
    pool: Pools, expected: dict[str, tuple[torch.Tensor, Any]], world_size: int
) -> None:
    by_rank = [answer_all(0, 1, "qwen2")] if world_size == 1 else pool(world_size).run(answer_all, "qwen2", timeout=120)
    assert len(by_rank) == world_size
    wrong = []
    for rank, answers in enumerate(by_rank):
        for (name, *way), (logits, tokens) in answers.items():
            expected_logits, expected_tokens = expected[name]
            difference = float((logits - expected_logits).abs().max())
            if not difference < TOLERANCE or tokens != expected_tokens:
                wrong.append((rank, name, way, difference, tokens, expected_tokens))
    assert not wrong, "\n".join(map(str, wrong))


def test_ranks_compute_equal_answers(pool: Pools) -> None:
    """Each rank's own logits, compared at `TOLERANCE`: equal bits are promised only of what the engine returns."""
    first, *others = pool(2).run(answer_all, "llama", timeout=120)
    for answers in others:
        assert answers.keys() == first.keys()
        for key, (logits, tokens) in answers.items():
            assert float((logits - first[key][0]).abs().max()) < TOLERANCE, key
            assert tokens == first[key][1], key


HEADS = Case("heads", 110, 3, {"hosts": 4, "compressor": "retaining_heads", "anchor_length": 11, "passing_length": 6})


def score_with_heads(rank: int, world_size: int, families: list[str]) -> dict[str, torch.Tensor]:
    """Return, for each family, the logits of a model with random heads as this rank computed them."""
    import apb_ds

    logits = {}
    for family in families:
        engine = engine_with_heads(build_model(family))
        engine.configure(apb_ds.APBConfig(**HEADS.given))
        document, query = HEADS.ids()
        logits[family] = own_query_logits(engine, query, engine.prefill(document, query))
    return logits


def test_heads_of_every_kind_of_projection(pool: Pools) -> None:
    """Three projections, with biases, with norms behind them, and one for all."""
    families = ["llama", "qwen2", "qwen3", "phi3"]
    by_rank = pool(2).run(score_with_heads, families, timeout=120)
    document, query = HEADS.ids()
    for family in families:
        expected = run_reference(build_model(family), document, query, **HEADS.reference_settings(family)).logits
        for logits in by_rank:
            assert float((logits[family] - expected).abs().max()) < TOLERANCE, family


def compute_apart(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Have the last rank forget the other ranks' parts at the query; return its own logits and the engine's."""
    import apb_ds
    from apb_ds.methods import decode

    engine = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(**CONVERSATION.given))
    document, query = CONVERSATION.ids()
    context = engine.prefill(document, query)
    merge = decode.merge_many
    with pytest.MonkeyPatch.context() as patch:
        if engine.group.is_last:
            patch.setattr(decode, "merge_many", lambda outs, lses: merge(outs[-1:], lses[-1:]))
        return own_query_logits(engine, query, context), engine.query_logits(query, context=context)


@pytest.mark.whole_weights("what one rank computes reaches all others")
def test_a_rank_that_computes_otherwise_is_noticed(pool: Pools) -> None:
    (own, returned), (other_own, other_returned) = pool(2).run(compute_apart)
    assert torch.equal(returned, other_returned)  # which is why the tests above look at each rank's own
    assert float((own - other_own).abs().max()) > 10 * TOLERANCE


CONVERSATION = Case("conversation", 120, 6, {"hosts": 4, "anchor_length": 14, "passing_length": 5})


def converse(rank: int, world_size: int, family: str) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """Ask twice and keep both turns; return the tokens, and a third question's logits with and without the turns."""
    import apb_ds

    engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**CONVERSATION.given))
    document, query = CONVERSATION.ids()
    context = engine.prefill(document, query)
    before = engine.query_logits(query, context=context)
    options: dict[str, Any] = {"context": context, "append": True, "do_sample": False}
    turns = [engine.generate(query_ids=ids, max_new_tokens=4, **options) for ids in (query, query[:, :3])]
    after = engine.query_logits(query.flip(1), context=context)
    return [turn.tolist() for turn in turns], before, after


@pytest.mark.parametrize(
    ("world_size", "family"),
    [(1, "qwen3"), (2, "qwen3"), (4, "qwen3"), (1, "gemma3"), (2, "gpt_oss"), (4, "gemma3n")],
)
def test_a_conversation_keeps_its_turns(pool: Pools, world_size: int, family: str) -> None:
    by_rank = [converse(0, 1, family)] if world_size == 1 else pool(world_size).run(converse, family)
    model = build_model(family)
    document, query = CONVERSATION.ids()
    settings = {**CONVERSATION.given, "embedded_query": query}
    first = reference_greedy(model, document, query, 4, **settings)
    so_far = torch.cat([query, first, query[:, :3]], dim=1)
    second = reference_greedy(model, document, so_far, 4, **settings)
    asked = torch.cat([so_far, second, query.flip(1)], dim=1)
    expected = run_reference(model, document, asked, **settings).logits[:, -query.shape[1] :]
    for turns, _, after in by_rank:
        assert turns == [first.tolist(), second.tolist()]
        assert float((after - expected).abs().max()) < TOLERANCE
