"""Ranks that talk over NCCL, a GPU each: the same answers as the references give on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import apb_ds
from apb_ds import cache
from apb_ds.engine.cuda_graph import DecodeStep
from apb_ds.parallel.groups import SequenceGroup
from tests import models
from tests.engine_cases import Case, own_query_logits
from tests.gpu.test_engine import BFLOAT16_TOLERANCE, Scores, relative_error
from tests.heads import engine_with_heads
from tests.models import HYBRIDS, build_model, request_ids
from tests.pool import NCCL, Pool
from tests.reference import reference_greedy, run_reference

RANKS = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"missing: {RANKS} CUDA devices"),
]

# As in test_engine.py: float32 on both sides, and a token too many moves the logits by more.
FLOAT32_TOLERANCE = 1e-3
NUM_NEW_TOKENS = 5

CASES = [
    Case("defaults", 203, 7),
    Case("one host a rank", 203, 7, {"hosts": 2}),
    Case("two rounds", 203, 7, {"hosts": 4, "compressor": "recent", "hosts_per_round": 1}),
    Case(
        "natural order, whole anchors",
        203,
        7,
        {"hosts": 4, "schedule": "natural", "shard_anchor": False, "hosts_per_round": 1},
    ),
    Case("two hosts a round", 203, 7, {"hosts": 4, "hosts_per_round": 2}),
    Case("query compressor", 203, 7, {"compressor": "query", "anchor_length": 17, "passing_length": 5}),
    Case("heads", 110, 3, {"hosts": 4, "compressor": "retaining_heads", "passing_length": 6}),
    Case("no anchor", 91, 5, {"anchor_length": 0, "passing_length": 4, "compressor": "knorm"}),
    Case("star", 91, 2, {"method": "star"}),
    Case("fewer tokens than hosts", 5, 4, {"anchor_length": 0, "passing_length": 1}),
    Case("exact", 60, 9),
]


@pytest.fixture(scope="module")
def nccl() -> Iterator[Pool]:
    """As many ranks as `RANKS`, over NCCL."""
    pool = Pool(RANKS, NCCL)
    yield pool
    pool.close()


def answer_cases(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, tuple[Tensor, Any]]:
    """Return each case's logits as this rank computed them, and the tokens, on the CPU."""
    engine = engine_with_heads(build_model("qwen2"), **options)
    assert engine.device == torch.device("cuda", rank) and engine.group.world_size == world_size
    answers = {}
    for case in CASES:
        document, query = case.ids()
        engine.configure(apb_ds.APBConfig(**case.given, fused=False))
        context = engine.prefill(document, query)
        # The last stage of a pipeline alone computes logits.
        own = engine.stage is None
        logits = own_query_logits(engine, query, context) if own else engine.query_logits(query, context=context)
        tokens = engine.generate(document, query, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        answers[case.name] = logits.cpu(), tokens.tolist()
    return answers


@pytest.mark.parametrize("options", [{}, {"shard_weights": True}, {"stages": RANKS}])
def test_answers_are_the_reference_on_every_rank(nccl: Pool, options: dict[str, Any]) -> None:
    by_rank = nccl.run(answer_cases, options, timeout=240)
    model = build_model("qwen2")
    for case in CASES:
        document, query = case.ids()
        settings = case.reference_settings("qwen2")
        for name in ("schedule", "shard_anchor", "hosts_per_round"):  # which change nothing
            settings.pop(name, None)
        if settings.pop("method", None) == "star":
            settings.update(anchor_length="block", passing_length=0, query_in_anchor=False)
        expected = run_reference(model, document, query, **settings).logits
        tokens = reference_greedy(model, document, query, NUM_NEW_TOKENS, **settings).tolist()
        for answers in by_rank:
            logits, generated = answers[case.name]
            assert float((logits - expected).abs().max()) < FLOAT32_TOLERANCE, case.name
            assert generated == tokens, case.name


def answer_during_a_prefill(rank: int, world_size: int, options: dict[str, Any]) -> list[Any]:
    """Return the tokens of answers that go on while another document is prefilled, and of one about that."""
    config = apb_ds.APBConfig(hosts=8, anchor_length=12, passing_length=5, fused=False, hosts_per_round=1)
    engine = apb_ds.init_inference(build_model("llama"), config, **options)
    document, query = request_ids(203, 9)
    context = engine.prefill(document, query, max_positions=400)
    given: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    with engine.batch(step_every_s=0.0) as batch:
        queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(3)]
        handles = [batch.submit(one, context=context, **given) for one in queries]
        batch.step()
        other = batch.prefill(request_ids(203, 5, seed=7)[0], query, max_positions=400)
        batch.run()
    answers = [handle.result() for handle in handles]
    return [one.tolist() for one in (*answers, engine.generate(query_ids=query, context=other, **given))]


def test_steps_inside_a_prefill_of_stages(nccl: Pool) -> None:
    whole = nccl.run(answer_during_a_prefill, {}, timeout=120)
    assert nccl.run(answer_during_a_prefill, {"stages": RANKS}, timeout=120) == whole


HYBRID = Case("hybrid", 190, 6, {"hosts": 4, "anchor_length": 47, "passing_length": 4})


def answer_with_hybrids(rank: int, world_size: int) -> dict[str, tuple[Tensor, Any]]:
    """Return each family's logits as this rank computed them, and the tokens, on the CPU."""
    answers = {}
    for family in HYBRIDS:
        engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**HYBRID.given, fused=False))
        document, query = HYBRID.ids()
        logits = own_query_logits(engine, query, engine.prefill(document, query))
        tokens = engine.generate(document, query, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        answers[family] = logits.cpu(), tokens.tolist()
        engine.destroy()
    return answers


def test_hybrids(nccl: Pool) -> None:
    by_rank = nccl.run(answer_with_hybrids, timeout=240)
    document, query = HYBRID.ids()
    for family in HYBRIDS:
        model = build_model(family)
        expected = run_reference(model, document, query, **HYBRID.given).logits
        tokens = reference_greedy(model, document, query, NUM_NEW_TOKENS, **HYBRID.given).tolist()
        for answers in by_rank:
            logits, generated = answers[family]
            assert float((logits - expected).abs().max()) < FLOAT32_TOLERANCE, family
            assert generated == tokens, family


def answer_exactly(rank: int, world_size: int, method: str) -> list[tuple[Tensor, Any]]:
    """Return logits and tokens of an exact method for `LENGTHS`, on the CPU."""
    engine = apb_ds.init_inference(
        models.llama(num_key_value_heads=4),
        apb_ds.APBConfig(method=method, fused=False),
        group=SequenceGroup.of(torch.distributed.group.WORLD),
    )
    answers = []
    for n in LENGTHS:
        document, query = request_ids(n, 4)
        logits = own_query_logits(engine, query, engine.prefill(document))
        tokens = engine.generate(document, query, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        answers.append((logits.cpu(), tokens.tolist()))
    return answers


LENGTHS = (1, 3, 8, 101)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_exact_methods_are_the_plain_model(nccl: Pool, method: str) -> None:
    by_rank = nccl.run(answer_exactly, method, timeout=120)
    model = models.llama(num_key_value_heads=4)
    for index, n in enumerate(LENGTHS):
        ids = torch.cat(request_ids(n, 4), dim=1)
        with torch.no_grad():
            expected = model(ids).logits[:, n:]
        tokens = model.generate(ids, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)[:, n + 4 :].tolist()
        for answers in by_rank:
            logits, generated = answers[index]
            assert float((logits - expected).abs().max()) < FLOAT32_TOLERANCE, n
            assert generated == tokens


def answer_in_half_precision(rank: int, world_size: int) -> Tensor:
    """Return a query's logits as this rank computed them, with everything that CUDA switches on."""
    engine = apb_ds.init_inference(build_model("llama").bfloat16(), apb_ds.APBConfig(hosts=4, compressor="recent"))
    assert engine._acceleration.fused is not None
    document, query = request_ids(203, 7)
    return own_query_logits(engine, query, engine.prefill(document, query)).cpu()


def test_half_precision_and_fused_layers(nccl: Pool) -> None:
    document, query = request_ids(203, 7)
    expected = run_reference(build_model("llama"), document, query, hosts=4, compressor="recent").logits
    for logits in nccl.run(answer_in_half_precision, timeout=240):
        assert relative_error(logits, expected) < BFLOAT16_TOLERANCE
        assert relative_error(logits.roll(1, dims=1), expected) > BFLOAT16_TOLERANCE


def answer_with_recorded_steps(rank: int, world_size: int) -> tuple[list[Tensor], int]:
    """Return the first rank's logits of forced tokens without and twice with recorded steps, and the recordings."""
    logits = []
    document, query = request_ids(203, 7)
    small_pages = mock.patch.object(cache, "PAGE_TOKENS", 4)  # the owner of new tokens changes between replays
    recorded = mock.patch.object(DecodeStep, "record", autospec=True, side_effect=DecodeStep.record)
    with small_pages, recorded as record:
        for cuda_graph in (False, True):
            config = apb_ds.APBConfig(hosts=4, fused=False, cuda_graph=cuda_graph)
            engine = apb_ds.init_inference(build_model("llama").bfloat16(), config)
            context = engine.prefill(document, query)
            for _ in range(2 if cuda_graph else 1):
                scores = Scores()
                engine.generate(
                    query_ids=query, context=context, max_new_tokens=12, do_sample=False, logits_processor=[scores]
                )
                logits.append(torch.cat(scores.seen).float() if scores.seen else torch.empty(0))
    return logits, record.call_count


def test_steps_are_recorded_on_all_ranks(nccl: Pool) -> None:
    (usual, recorded, again), records = nccl.run(answer_with_recorded_steps, timeout=120)[0]
    assert records == 1
    for found in (recorded, again):
        assert relative_error(found, usual) < BFLOAT16_TOLERANCE / 5
    assert relative_error(usual.roll(1, dims=0), usual) > BFLOAT16_TOLERANCE, "a token late would be noticed"


def fail_on_one(rank: int, world_size: int) -> str:
    """Ask with a document that is bad on the last rank; return what this rank says."""
    engine = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(hosts=4, fused=False))
    document, query = request_ids(40, 3)
    try:
        engine.prefill(document.float() if rank == world_size - 1 else document, query)
    except Exception as error:  # which one is what the test looks at
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_bad_input_on_one_rank_is_an_error_on_all(nccl: Pool) -> None:
    first, last = nccl.run(fail_on_one)
    assert "int64" in last and last.startswith("ValueError")
    assert "rank 1" in first and "int64" in first
