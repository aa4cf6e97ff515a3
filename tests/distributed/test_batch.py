"""Many requests at once on several ranks: each rank's answers are those of one process, one at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.engine_cases import TOLERANCE
from tests.models import build_model
from tests.pool import Pools
from tests.schedules import EXACT, FULL_SCHEDULE, WrongAnswer, play, schedule_model, small_sizes
from tests.together import (
    DOCUMENTS,
    GIVEN,
    NEW,
    QUERIES,
    alone,
    answers_alone,
    answers_together,
    ask_apart,
    differences,
    ids,
    same_shards,
)

FAMILIES = {
    2: ["llama", "dynamic_rope", "gemma3", "gpt_oss"],
    4: ["phi3_switching", "mistral_window", "gemma3n", "deepseek_v3"],
}


def new_engine(family: str, given: dict[str, Any] = GIVEN) -> Any:
    import apb_ds
    from tests.heads import engine_with_heads

    if "heads" not in given.get("compressor", ""):
        return apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**given))
    engine = engine_with_heads(build_model(family))
    engine.configure(apb_ds.APBConfig(**given))
    return engine


@cache
def expected(family: str) -> dict[str, Any]:
    return answers_alone(new_engine(family))


def answer_together(rank: int, world_size: int, ends: dict[str, int]) -> dict[str, Any]:
    return {family: answers_together(new_engine(family), end) for family, end in ends.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_answer_together_as_one_process_one_at_a_time(pool: Pools, world_size: int) -> None:
    ends = {family: expected(family)["ends"][-1] for family in FAMILIES[world_size]}
    for found in pool(world_size).run(answer_together, ends, timeout=180):
        wrong = {family: differences(found[family], expected(family), TOLERANCE) for family in FAMILIES[world_size]}
        assert not any(wrong.values()), wrong


def ask_apart_by_family(rank: int, world_size: int) -> list[Any]:
    return [ask_apart(new_engine(family)) for family in FAMILIES[world_size]]


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_copies_its_shard(pool: Pools, world_size: int) -> None:
    one_process = [ask_apart(new_engine(family))[0] for family in FAMILIES[world_size]]
    for by_family in pool(world_size).run(ask_apart_by_family, timeout=180):
        assert [expected for expected, _, _ in by_family] == one_process
        assert [found for _, found, _ in by_family] == one_process
        assert all(copied == [True] * 4 for _, _, copied in by_family)


def join_in_parts(rank: int, world_size: int) -> dict[str, list[list[int]]]:
    """Ask long questions while another is answered, and go on with one of their conversations."""
    return {family: long_questions(new_engine(family), together=True) for family in FAMILIES[world_size]}


def long_questions(engine: Any, together: bool) -> list[list[int]]:
    context = engine.prefill(DOCUMENTS[0], max_positions=300)
    branch = context.branch()
    long = [ids(length, length) for length in (41, 25)]
    if not together:
        turns = torch.cat([long[1], torch.tensor([alone(engine, long[1], context)]), QUERIES[1]], dim=1)
        return [*(alone(engine, query, context) for query in (QUERIES[0], *long)), alone(engine, turns, context)]
    with small_sizes(), engine.batch() as batch:
        handles = [batch.submit(QUERIES[0], context=context, max_new_tokens=NEW)]
        batch.step()
        handles.append(batch.submit(long[0], context=context, max_new_tokens=NEW))
        handles.append(batch.submit(long[1], context=branch, append=True, max_new_tokens=NEW))
        batch.step()
        assert len(handles[0].tokens) == 3 and not handles[1].tokens
        batch.run()
        handles.append(batch.submit(QUERIES[1], context=branch, append=True, max_new_tokens=NEW))
        batch.run()
    return [handle.tokens for handle in handles]


@pytest.mark.parametrize("world_size", [2, 4])
def test_long_questions_join_in_parts(pool: Pools, world_size: int) -> None:
    wanted = {family: long_questions(new_engine(family), together=False) for family in FAMILIES[world_size]}
    assert pool(world_size).run(join_in_parts, timeout=180) == [wanted] * world_size


def play_schedule(rank: int, world_size: int, faulty_rank: int | None) -> list[Any] | str:
    """Return every answer, or "wrong" if one is not the plain model's."""
    import apb_ds
    from apb_ds.suffixes import Shares

    engine = apb_ds.init_inference(schedule_model(), apb_ds.APBConfig(**EXACT))
    with small_sizes() as patch:
        if rank == faulty_rank:  # it does not notice that another rank takes over
            after = Shares.after
            patch.setattr(Shares, "after", lambda self, forwards: replace(after(self, forwards), owner=self.owner))
        try:
            scene = play(engine, schedule_model(), FULL_SCHEDULE)
        except WrongAnswer:
            return "wrong"
    return [(one.handle.tokens, type(one.handle.error).__name__) for one in scene.asked]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_schedule_of_requests_is_answered_as_by_the_plain_model(pool: Pools, world_size: int) -> None:
    by_rank = pool(world_size).run(play_schedule, None, timeout=180)
    assert all(answers == by_rank[0] for answers in by_rank) and by_rank[0] == play_schedule(0, 1, None)


def test_a_rank_that_keeps_a_page_too_long_is_noticed(pool: Pools) -> None:
    assert pool(2).run(play_schedule, 1, timeout=180)[0] == "wrong"


METHODS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("phi3_switching", GIVEN),
        ("qwen3", {**GIVEN, "compressor": "retaining_heads"}),
        ("llama", {**GIVEN, "compressor": "query"}),
        ("dynamic_rope", {"method": "star", "hosts": 4}),
        ("gemma3", {"method": "ring"}),
        ("phi3_switching", {"method": "ulysses"}),
    ],
    4: [("gemma3n", GIVEN)],
}


def step_within_prefills(rank: int, world_size: int, methods: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Prefill with and without steps inside, by method; return what differs, and the numbers of steps."""
    found = []
    for family, given in methods:
        engine = new_engine(family, given)
        context = engine.prefill(DOCUMENTS[0], QUERIES[0], max_positions=100)
        plain = engine.prefill(DOCUMENTS[1], QUERIES[1])
        queries = QUERIES[:2]
        answers = [alone(engine, query, context, max_new_tokens=10) for query in queries]
        asked = alone(engine, QUERIES[1], plain)
        late_answer = engine.generate(DOCUMENTS[1], QUERIES[1], max_new_tokens=3)[0].tolist()
        with engine.batch(step_every_s=0.0) as batch:
            handles = [batch.submit(query, context=context, max_new_tokens=10) for query in queries]
            batch.step()
            before = len(handles[0].tokens)
            within = batch.prefill(DOCUMENTS[1], QUERIES[1])
            num_steps = len(handles[0].tokens) - before
            late = batch.submit(QUERIES[1], document_ids=DOCUMENTS[1], max_new_tokens=3)
            batch.run()
        is_right = {
            "shards": same_shards(within, plain, engine.layers),
            "prefill": alone(engine, QUERIES[1], within) == asked,
            "steps": [handle.tokens for handle in handles] == answers,
            "document": late.tokens == late_answer,
        }
        found.append(([name for name, right in is_right.items() if not right], num_steps))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_within_a_prefill_change_neither(pool: Pools, world_size: int) -> None:
    by_rank = pool(world_size).run(step_within_prefills, METHODS[world_size], timeout=180)
    for found in by_rank:
        for (family, given), (wrong, num_steps) in zip(METHODS[world_size], found, strict=True):
            assert wrong == [] and num_steps > 1, (family, given)
    assert all(found == by_rank[0] for found in by_rank)


SHORT = [ids(5, 3), ids(3, 4), ids(4, 5)]  # too short for an anchor: exact


def answer_short_documents(rank: int, world_size: int, family: str) -> list[Any]:
    engine = new_engine(family, {"hosts": 4, "anchor_length": 8, "passing_length": 4})
    found = engine.generate(document_ids=SHORT, query_ids=QUERIES[:3], max_new_tokens=5)
    assert engine.stats.prefill_s == 0, "they share their queries' forward"
    return [tokens.tolist() for tokens in found]


def test_short_documents_share_a_forward(pool: Pools) -> None:
    engine = new_engine("gemma3", {"hosts": 1})
    expected = [
        engine.generate(document, query, max_new_tokens=5).tolist()
        for document, query in zip(SHORT, QUERIES[:3], strict=True)
    ]
    assert pool(2).run(answer_short_documents, "gemma3") == [expected] * 2


class Raises(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            raise ZeroDivisionError("failure in a processor")
        return scores


def fail_differently(rank: int, world_size: int) -> dict[str, Any]:
    engine = new_engine("llama")
    context = engine.prefill(DOCUMENTS[0], max_positions=200)
    branch = context.branch()
    expected = [alone(engine, query, context) for query in QUERIES]
    processors = LogitsProcessorList([Raises(60 + 6 + 3)])
    unprepared = {"do_sample": True, "temperature": -1.0}  # refused where the chooser is made, on the first rank
    odd = QUERIES[2] if rank else QUERIES[2].flip(1)
    short = QUERIES[3] if rank else QUERIES[3][:, :0]
    report: dict[str, Any] = {}
    with engine.batch(max_sequences=4) as batch:
        fails = batch.submit(QUERIES[0], context=branch, append=True, logits_processor=processors, max_new_tokens=NEW)
        others = [batch.submit(query, context=context, max_new_tokens=NEW) for query in QUERIES]
        begins_not = batch.submit(QUERIES[1], context=context, **unprepared)
        waiting = batch.submit(QUERIES[1], context=context, max_new_tokens=NEW)
        batch.step()
        if rank == 0:
            waiting.cancel()
            others[1].cancel()
        else:
            others[2].cancel()  # only the first rank's counts
        batch.step()
        report["ended at the next step"] = (waiting.is_done, others[1].is_done, others[2].is_done)
        for name, ids in (("differ", odd), ("empty", short)):
            try:
                batch.submit(ids, context=context)
            except ValueError as error:
                report[name] = str(error)
        batch.run()
    report["branch"] = (branch.is_busy, branch.num_tokens, branch.suffix is None)
    report["failed"] = [type(one.error).__name__ for one in (fails, begins_not, waiting, others[1])]
    report["tokens"] = [len(one.tokens) for one in (fails, begins_not, waiting, others[1])]
    report["others"] = [others[index].tokens == expected[index] for index in (0, 2, 3)]
    report["list"] = [
        isinstance(answer, ValueError) or answer[0].tolist()
        for answer in engine.generate(query_ids=[QUERIES[0], odd, QUERIES[1]], context=context, max_new_tokens=NEW)
    ]
    report["list is right"] = report["list"] == [expected[0], True, expected[1]]
    report["is free"] = all(slab.is_unused for slab in engine.pool._slabs.values())
    return report


def test_a_failure_is_its_requests_alone_on_every_rank(pool: Pools) -> None:
    first, second = pool(2).run(fail_differently)
    assert first["failed"] == ["ZeroDivisionError", "ValueError", "Cancelled", "Cancelled"]
    assert second["failed"] == ["RuntimeError", "RuntimeError", "Cancelled", "Cancelled"]
    for report in (first, second):
        assert report["tokens"] == [3, 0, 0, 2]
        assert report["ended at the next step"] == (True, True, False)
        assert report["others"] == [True] * 3
        assert report["branch"] == (False, 60, True)
        assert "query_ids" in report["differ"] and "empty" in report["empty"]
        assert report["list is right"] and report["is free"], report
    assert first["list"] == second["list"]


def fail_in_admission(rank: int, world_size: int) -> list[str]:
    """Ranks with different memory: the smallest counts everywhere."""
    from apb_ds.engine import batch as module

    engine = new_engine("llama")
    context = engine.prefill(DOCUMENTS[0])
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "available_bytes", lambda _: 10_000 if rank == 1 else 2**33)
        with engine.batch() as batch:
            try:
                batch.submit(QUERIES[0], context=context, max_new_tokens=NEW)
            except ValueError as error:
                messages.append(str(error))
    return messages


def test_the_rank_with_least_memory_counts(pool: Pools) -> None:
    first, second = pool(2).run(fail_in_admission)
    assert len(first) == 1 and first == second and "the batch has" in first[0]


def answer_at_length(rank: int, world_size: int) -> tuple[list[int], int]:
    """Keep a long answer in a branch; return the shares as all ranks count them, and what this rank stores."""
    engine = new_engine("llama")
    branch = engine.prefill(DOCUMENTS[0], max_positions=400).branch()
    with small_sizes():
        alone(engine, QUERIES[0], branch, append=True, max_new_tokens=40)
        return list(branch.suffix.shares.stored), branch.suffix.places[None].length


def test_a_long_answer_is_spread_over_the_ranks(pool: Pools) -> None:
    by_rank = pool(2).run(answer_at_length)
    stored = [length for _, length in by_rank]
    assert sum(stored) == 6 + 39 and max(stored) - min(stored) < 4 + 6
    assert all(shares == stored for shares, _ in by_rank)
