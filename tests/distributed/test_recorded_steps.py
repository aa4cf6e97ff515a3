"""Decode steps that several ranks record together, run on CPU as they would be recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import apb_ds
from apb_ds import cache
from apb_ds.engine import cuda_graph as steps
from apb_ds.engine.cuda_graph import DecodeStep
from apb_ds.ops.kernels.torch_kernels import CPUFlashKernel
from tests.models import build_model, request_ids
from tests.pool import Pools

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
NEW = 9


class Counts:
    """How many steps were recorded and run on this rank."""

    def __init__(self) -> None:
        self.recorded = 0
        self.run = 0


@contextmanager
def recording(fails: bool = False) -> Iterator[Counts]:
    """Have steps recorded on the CPU: warming up runs the step, with all that it sends, and recording does nothing."""
    counts = Counts()
    run = DecodeStep.run

    def warm_up(self: Any, model: Any, cache_: Any, call: Any) -> None:
        self.prepare(model, cache_)
        self._set(self._token, cache_)
        self.forward(model, cache_, call)

    def record(*_: Any) -> None:
        counts.recorded += 1
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def run_as_it_is(self: Any, *arguments: Any) -> Any:
        counts.run += 1
        return run(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUFlashKernel, "can_be_recorded", True)
        patch.setattr(DecodeStep, "warm_up", warm_up)
        patch.setattr(DecodeStep, "record", record)
        patch.setattr(DecodeStep, "run", run_as_it_is)
        yield counts


def new_engine(cuda_graph: Any, method: str = "apb", family: str = "llama") -> Any:
    given = GIVEN if method == "apb" else {}
    return apb_ds.init_inference(build_model(family), apb_ds.APBConfig(method=method, cuda_graph=cuda_graph, **given))


def answer(engine: Any, context: Any, num_new: int = NEW, **given: Any) -> list[int]:
    query = request_ids(101, 5)[1]
    tokens = engine.generate(query_ids=query, context=context, max_new_tokens=num_new, do_sample=False, **given)
    return tokens[0].tolist()


def answer_twice(
    rank: int, world_size: int, method: str, family: str, page: int = cache.PAGE_TOKENS
) -> tuple[list[list[int]], list[list[int]], int, int]:
    """Return what two documents are answered with and without recording, and how often a step was recorded and run."""
    answers = []
    with pytest.MonkeyPatch.context() as patch, recording() as counts:
        patch.setattr(cache, "PAGE_TOKENS", page)
        for cuda_graph in (False, True):
            engine = new_engine(cuda_graph, method, family)
            found = []
            for length in (101, 97):
                document, query = request_ids(length, 5)
                context = engine.prefill(document, query)
                found += [answer(engine, context), answer(engine, context)]
            answers.append(found)
            if not cuda_graph:
                assert counts.recorded == counts.run == 0
    return answers[0], answers[1], counts.recorded, counts.run


@pytest.mark.parametrize(
    ("world_size", "method", "family", "page"),
    [
        (2, "apb", "llama", cache.PAGE_TOKENS),
        (4, "apb", "llama", 2),
        (2, "ring", "llama", 2),
        (4, "ring", "llama", cache.PAGE_TOKENS),
        (2, "apb", "gpt_oss", 2),
        (4, "apb", "gemma3", 2),
        (2, "apb", "gemma3n", 2),
        (2, "apb", "deepseek_v3", 2),
    ],
)
def test_the_tokens_are_the_same(pool: Pools, world_size: int, method: str, family: str, page: int) -> None:
    """Also where new tokens go to another rank every few steps: a recording does not know which."""
    by_rank = pool(world_size).run(answer_twice, method, family, page, timeout=120)
    for usual, recorded, num_recorded, num_run in by_rank:
        assert recorded == usual == by_rank[0][0]
        # One recording serves both answers of a document, and the next document where its buffers were handed on.
        assert 1 <= num_recorded <= 2
        first, later = NEW - steps.RECORD_AFTER, NEW - 1
        assert num_run == first * num_recorded + later * (4 - num_recorded)
    assert len({numbers[2:] for numbers in by_rank}) == 1, "ranks record together"


def fail_on_the_last_rank(rank: int, world_size: int) -> tuple[list[int], list[int], int, int]:
    document, query = request_ids(101, 5)
    usual = new_engine(False)
    expected = answer(usual, usual.prefill(document, query))
    with recording(fails=rank == world_size - 1) as counts:
        engine = new_engine(True)
        context = engine.prefill(document, query)
        assert answer(engine, context) == answer(engine, context)
        return expected, answer(engine, context), counts.recorded, counts.run


def test_where_one_rank_cannot_record_none_does(pool: Pools) -> None:
    for expected, found, num_recorded, num_run in pool(2).run(fail_on_the_last_rank):
        assert found == expected and (num_recorded, num_run) == (1, 0)


def grow_on_the_last_rank(rank: int, world_size: int, family: str) -> tuple[list[list[int]], list[list[int]], int]:
    """Long answers into buffers that hold hardly more than they must."""
    document, query = request_ids(101, 5)
    turns = []
    with pytest.MonkeyPatch.context() as patch, recording() as counts:
        patch.setattr(cache, "GROWTH_TOKENS", 1)
        patch.setattr(cache, "STEP_TOKENS", 4)
        for cuda_graph in (False, True):
            engine = new_engine(cuda_graph, family=family)
            context = engine.prefill(document, query)
            turns.append([answer(engine, context, 40, append=True) for _ in range(2)])
    return turns[0], turns[1], counts.run


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_rank_whose_buffers_grow_goes_on_by_itself(pool: Pools, family: str) -> None:
    """With sinks, too, which one rank counts in both ways of running a step."""
    first, last = pool(2).run(grow_on_the_last_rank, family)
    assert first[0] == first[1] == last[0] == last[1]
    assert 0 < last[2] < first[2], "the others go on with what they recorded"


def grow_on_one_rank_after_the_other(rank: int, world_size: int) -> tuple[list[list[int]], list[list[int]], int]:
    """One rank's buffers are full once it is its turn; the other goes on with recorded steps."""
    document, query = request_ids(101, 5)
    turns = []
    with pytest.MonkeyPatch.context() as patch, recording() as counts:
        patch.setattr(cache, "PAGE_TOKENS", 6)
        patch.setattr(cache, "GROWTH_TOKENS", 1)
        patch.setattr(cache, "STEP_TOKENS", 4)
        for cuda_graph in (False, True):
            engine = new_engine(cuda_graph, family="gpt_oss")
            for layer in engine.module.model.layers:
                layer.self_attn.sinks.mul_(5.0)  # large enough to change tokens if they are counted twice
            context = engine.prefill(document, query)
            context.cache.buffers(num_new=40 * rank)  # only this rank has room
            turns.append([answer(engine, context, 30, append=True) for _ in range(2)])
    return turns[0], turns[1], counts.run


def test_sinks_count_once_where_the_owner_alone_is_not_recorded(pool: Pools) -> None:
    by_rank = pool(2).run(grow_on_one_rank_after_the_other)
    assert len({str(turns) for usual, recorded, _ in by_rank for turns in (usual, recorded)}) == 1
    assert 0 < by_rank[0][2] < by_rank[1][2]


def move_weights_on_one_rank(rank: int, world_size: int) -> tuple[list[list[int]], int]:
    document, query = request_ids(101, 5)
    with recording() as counts:
        engine = new_engine(True)
        context = engine.prefill(document, query)
        answers = [answer(engine, context)]
        if rank == 0:
            engine.module.lm_head.weight.data = engine.module.lm_head.weight.data.clone()
        answers.append(answer(engine, context))
    return answers, counts.recorded


def test_what_one_rank_must_record_anew_all_do(pool: Pools) -> None:
    for answers, num_recorded in pool(2).run(move_weights_on_one_rank):
        assert answers[0] == answers[1] and num_recorded == 2


def ask_few_tokens(rank: int, world_size: int) -> tuple[list[int], list[int], int]:
    """Some ranks hold no key at all."""
    document, query = request_ids(3, 5)
    answers = []
    with recording() as counts:
        for cuda_graph in (False, True):
            config = apb_ds.APBConfig(hosts=4, anchor_length=0, passing_length=1, cuda_graph=cuda_graph)
            engine = apb_ds.init_inference(build_model("llama"), config)
            answers.append(answer(engine, engine.prefill(document, query)))
    return answers[0], answers[1], counts.recorded


def test_a_rank_without_keys_has_nothing_recorded(pool: Pools) -> None:
    for usual, found, num_recorded in pool(4).run(ask_few_tokens):
        assert found == usual and num_recorded == 0


def ask_less_the_second_time(rank: int, world_size: int) -> tuple[list[list[int]], list[list[int]], int]:
    """A rank without a document is given a key before a step is recorded, and none before the next answer's steps."""
    document, query = request_ids(1, 5)
    answers = []
    with pytest.MonkeyPatch.context() as patch, recording() as counts:
        patch.setattr(cache, "PAGE_TOKENS", 4)
        for cuda_graph in (False, True):
            config = apb_ds.APBConfig(hosts=2, anchor_length=0, passing_length=1, cuda_graph=cuda_graph)
            engine = apb_ds.init_inference(build_model("llama"), config)
            context = engine.prefill(document, query)
            options: dict[str, Any] = {"context": context, "max_new_tokens": NEW, "do_sample": False}
            answers.append([engine.generate(query_ids=ids, **options)[0].tolist() for ids in (query, query[:, :1])])
    return answers[0], answers[1], counts.recorded


def test_a_rank_whose_keys_are_gone_does_not_replay(pool: Pools) -> None:
    by_rank = pool(2).run(ask_less_the_second_time)
    for usual, found, num_recorded in by_rank:
        assert found == usual == by_rank[0][0] and num_recorded == 1


def count_bytes(rank: int, world_size: int) -> tuple[int, int, int]:
    """Return what a rank sends for an answer without recording, with it, and in one step."""
    document, query = request_ids(101, 5)
    sent = []
    with recording():
        for cuda_graph in (False, True):
            engine = new_engine(cuda_graph)
            context = engine.prefill(document, query)
            before = engine.group.bytes_sent
            answer(engine, context)
            sent.append(engine.group.bytes_sent - before)
    config = engine.module.config
    head_dim = config.hidden_size // config.num_attention_heads
    step = config.num_hidden_layers * config.num_attention_heads * (head_dim + 1) * 4 * (world_size - 1)
    return sent[0], sent[1], step


@pytest.mark.whole_weights("counts bytes")
def test_bytes_are_counted(pool: Pools) -> None:
    for usual, found, step in pool(2).run(count_bytes):
        asked = 3 * 8  # whether there is a step, a key on every rank, and whether it was recorded
        assert found == usual + step + asked, "once more than there are tokens, to warm up"


def test_records_need_the_setting() -> None:
    torch.manual_seed(0)
    with recording():
        assert new_engine(True)._recorded is not None and new_engine(None)._recorded is not None
        assert new_engine(False)._recorded is None
