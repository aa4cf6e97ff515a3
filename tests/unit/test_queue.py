"""Questions that are answered together: the answers are those of one at a time, and memory may run out."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import apb_ds
from apb_ds.engine import batch as engine_batch
from apb_ds.engine import packs
from apb_ds.engine.batch import Batch
from apb_ds.engine.engine import APBEngine
from apb_ds.tasks.queue import AnswerQueue, Ended, Question
from tests import models

NEW_TOKENS = 7
SAMPLED = {"do_sample": True, "temperature": 2.0}


@pytest.fixture
def engine() -> APBEngine:
    return apb_ds.init_inference(models.llama(), apb_ds.APBConfig(hosts=2))


def ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(models.VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def questions(engine: APBEngine, lengths: tuple[int, ...] = (60, 90), each: int = 3) -> list[Question]:
    """Return some questions about each of several documents; every other is sampled."""
    contexts = [engine.prefill(ids(length, length)) for length in lengths]
    return [
        Question(
            ids(10 + number, 3 + number),
            context,
            max_new_tokens=NEW_TOKENS - number,
            seed=number,
            arguments=SAMPLED if number % 2 else {},
            tag=(place, number),
        )
        for place, context in enumerate(contexts)
        for number in range(each)
    ]


def answer(queue: AnswerQueue, asked: list[Question]) -> list[Ended]:
    ended: list[Ended] = []
    for question in asked:
        queue.ask(question)
        while queue.is_full:
            ended += queue.step()
    while len(queue):
        ended += queue.step()
    return ended


def alone(engine: APBEngine, asked: list[Question]) -> dict[Any, list[int]]:
    return {
        one.tag: engine.generate(
            query_ids=one.query_ids,
            context=one.context,
            max_new_tokens=one.max_new_tokens,
            seed=one.seed,
            **one.arguments,
        )[0].tolist()
        for one in asked
    }


@pytest.mark.parametrize("sequences", [1, 2, 4, 32])
def test_answers_are_those_of_one_at_a_time(engine: APBEngine, sequences: int) -> None:
    asked = questions(engine)
    rows = []
    run_pack = packs.run_pack

    def recorded(engine: Any, members: Any, **options: Any) -> Any:
        rows.append(len(members))
        return run_pack(engine, members, **options)

    with mock.patch.object(engine_batch, "run_pack", recorded), AnswerQueue(engine, sequences) as queue:
        ended = answer(queue, asked)
        stats = queue.stats
    assert {one.question.tag: one.tokens for one in ended} == alone(engine, asked)
    assert max(rows, default=1) == min(sequences, len(asked)), "one at a time makes no packs"
    assert [one.error for one in ended] == [None] * len(asked)
    assert stats.new_tokens == sum(len(one.tokens) for one in ended)
    shares = sum(one.share_s for one in ended)
    assert shares == pytest.approx(stats.decode_s, rel=1e-6)
    if sequences > 1:
        assert sum(one.decode_s for one in ended) > 1.5 * shares, "a step counts for each of its sequences"


def test_the_last_question_takes_the_path_for_one(engine: APBEngine) -> None:
    asked = questions(engine, (60,), each=1)
    with AnswerQueue(engine, 8) as queue, mock.patch.object(engine, "batch", side_effect=AssertionError):
        (ended,) = answer(queue, asked)
    assert ended.tokens == alone(engine, asked)[0, 0] and ended.share_s == ended.decode_s > 0


def test_a_question_that_is_refused_fails_alone(engine: APBEngine) -> None:
    asked = questions(engine)
    bad = Question(ids(0, 4), asked[0].context, max_new_tokens=1, arguments={"num_beams": 2}, tag="beams")
    with AnswerQueue(engine, 4) as queue:
        found = {one.question.tag: one for one in answer(queue, [*asked[:1], bad, *asked[1:]])}
    assert "num_beams=2" in str(found.pop("beams").error)
    assert {tag: one.tokens for tag, one in found.items()} == alone(engine, asked)
    with AnswerQueue(engine, 1) as queue:
        (one,) = answer(queue, [bad])
    assert isinstance(one.error, ValueError)


def test_fewer_go_on_together_after_memory_ran_out(engine: APBEngine, caplog: pytest.LogCaptureFixture) -> None:
    asked = questions(engine)
    expected = alone(engine, asked)
    step, failures, sizes = Batch.step, iter([False, True, False, True]), []

    def failing(self: Batch) -> Any:
        sizes.append(self._max_sequences)
        if next(failures, False):
            raise torch.OutOfMemoryError("no memory")
        return step(self)

    with (
        mock.patch.object(Batch, "step", failing),
        AnswerQueue(engine, 4, "task.sequences") as queue,
        caplog.at_level(logging.WARNING),
    ):
        ended = answer(queue, asked)
    assert {one.question.tag: one.tokens for one in ended} == expected and len(ended) == len(asked)
    assert set(sizes) == {4, 2}, "then one at a time"
    assert "task.sequences=2" in caplog.text and "task.sequences=1" in caplog.text
    assert engine.pool.num_bytes < 2**20, "what was begun is freed"


def test_a_request_for_which_memory_runs_out_is_asked_again(engine: APBEngine) -> None:
    asked = questions(engine)
    expected = alone(engine, asked)
    new, calls = engine.pool.new, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return new(*arguments)

    with mock.patch.object(engine.pool, "new", failing), AnswerQueue(engine, 4) as queue:
        ended = answer(queue, asked)
    assert {one.question.tag: one.tokens for one in ended} == expected and len(ended) == len(asked)


def test_memory_that_runs_out_on_one_of_several_ranks_says_what_to_set(engine: APBEngine) -> None:
    with AnswerQueue(engine, 4, "eval.sequences") as queue:
        queue._group = SimpleNamespace(world_size=2)  # type: ignore[assignment]
        with pytest.raises(torch.OutOfMemoryError, match=r"no memory\. Or set eval\.sequences=2"):
            queue._check_memory(torch.OutOfMemoryError("no memory."))
        with pytest.raises(KeyError):
            queue._check_shared(KeyError("a bug"))
        queue._check_shared(ValueError("bad input, which all ranks have"))


def test_a_document_that_does_not_fit_next_to_others_waits(engine: APBEngine) -> None:
    asked = questions(engine)
    plan = asked[0].context.plan  # type: ignore[union-attr]
    with AnswerQueue(engine, 32) as queue:
        queue._document_bytes = 0
        assert queue.has_room(plan), "alone it may always try"
        queue.ask(asked[0])
        queue.ask(asked[1])
        assert not queue.has_room(plan)
        queue._document_bytes = engine.pool.document_bytes(60 + 60)  # one context, though two questions
        assert queue.has_room(plan)
        assert not queue.has_room(asked[-1].context.plan), "the longer one"  # type: ignore[union-attr]
        while len(queue):
            queue.step()
        assert queue.has_room(plan)


def test_a_prefill_for_which_memory_runs_out(engine: APBEngine) -> None:
    asked = questions(engine)
    with AnswerQueue(engine, 32) as queue, mock.patch.object(engine, "prefill") as prefill:
        prefill.side_effect = torch.OutOfMemoryError("no memory")
        with pytest.raises(torch.OutOfMemoryError):
            queue.prefill(ids(0, 30), None, max_positions=60)
        queue.ask(asked[0])
        assert queue.prefill(ids(0, 30), None, max_positions=60) is None


def test_short_exact_documents_share_a_forward(engine: APBEngine) -> None:
    engine.configure(apb_ds.APBConfig(method="dense"))
    documents = [ids(number, 20 + number) for number in range(3)]
    asked = [
        Question(ids(10, 4), document_ids=document, max_new_tokens=5, tag=number)
        for number, document in enumerate(documents)
    ]
    with (
        AnswerQueue(engine, 3) as queue,
        mock.patch.object(engine, "_run_prefill", side_effect=AssertionError),
        mock.patch.object(engine_batch, "run_pack", wraps=packs.run_pack) as run_pack,
    ):
        ended = answer(queue, asked)
    first = run_pack.call_args_list[0].args[1]
    assert len(first) == 3
    for one in ended:
        expected = engine.generate(documents[one.question.tag], ids(10, 4), max_new_tokens=5)
        assert one.tokens == expected[0].tolist()
    plans = [engine.prefill(ids(0, length)).plan for length in (1024, 1025)]
    assert [queue.shares_forward(plan) for plan in plans] == [True, False]
    assert not AnswerQueue(engine, 1).shares_forward(plans[0])


@pytest.mark.parametrize("sequences", [1, 3, 32])
def test_scores_of_continuations(engine: APBEngine, sequences: int) -> None:
    """One is no continuation in the vocabulary, and fails alone; it is in the middle of a pack."""
    contexts = [engine.prefill(ids(length, length)) for length in (60, 90)]
    query = ids(3, 5)
    continuations = [tuple(ids(20 + number, 2 + number)[0].tolist()) for number in range(4)]
    asked = [
        Question(query, context, continuation=continuation, tag=(place, number))
        for place, context in enumerate(contexts)
        for number, continuation in enumerate(continuations)
    ]
    bad = Question(query, contexts[0], continuation=(models.VOCAB_SIZE,) * 2, tag="bad")
    with AnswerQueue(engine, sequences) as queue:
        found = {one.question.tag: one for one in answer(queue, [*asked[:5], bad, *asked[5:]])}
    assert "vocabulary" in str(found.pop("bad").error)
    assert len(found) == len(asked)
    for (place, number), one in found.items():
        whole = torch.cat([query, torch.tensor([continuations[number]])], dim=1)
        log_probs = engine.query_logits(whole, context=contexts[place])[0, 4:-1].log_softmax(dim=-1)
        wanted = torch.tensor(continuations[number])
        expected = float(log_probs.gather(-1, wanted[:, None]).sum())
        assert one.score == (pytest.approx(expected, abs=1e-4), bool((log_probs.argmax(-1) == wanted).all()))
