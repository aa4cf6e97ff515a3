"""Ranks decode in lockstep: they share every token and every failure, whatever differs between them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tests.engine_cases import TOLERANCE, own_query_logits
from tests.generation_parts import Recorder, StopAfter
from tests.models import VOCAB_SIZE, build_model, request_ids
from tests.pool import Pools

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 4}
N, Q = 101, 5


def new_engine(**given: Any) -> Any:
    import apb_ds

    return apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(**{**GIVEN, **given}))


class Slow(StoppingCriteria):
    """Never stops, and is slow: the ranks' clocks differ."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Fails(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            raise ValueError("failure in the processor")
        return scores


def sample(rank: int, world_size: int) -> list[Any]:
    document, query = request_ids(N, Q)
    engine = new_engine()
    answers = []
    for seed in range(3):
        torch.manual_seed(100 * rank + seed)
        tokens = engine.generate(document, query, max_new_tokens=8, do_sample=True, temperature=3.0)
        answers.append(tokens.tolist())
    return answers


def test_different_seeds_give_the_first_ranks_tokens(pool: Pools) -> None:
    by_rank = pool(2).run(sample)
    assert by_rank[0] == by_rank[1]
    assert len({str(answer) for answer in by_rank[0]}) == 3
    assert sample(0, 1) == by_rank[0]  # the first rank's random numbers, as in a single process


def sample_with_seeds(rank: int, world_size: int) -> tuple[list[Any], str]:
    document, query = request_ids(N, Q)
    engine = new_engine()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 3.0}
    torch.manual_seed(rank)
    answers = [engine.generate(document, query, seed=seed, **options).tolist() for seed in (4, 4, 5)]
    try:
        engine.generate(document, query, seed=rank, **options)
    except ValueError as error:
        return answers, str(error)
    return answers, ""


def test_a_seed_gives_all_ranks_the_answer_of_one(pool: Pools) -> None:
    alone, refused = sample_with_seeds(0, 1)
    assert alone[0] == alone[1] != alone[2]
    assert refused == ""
    for answers, refused in pool(2).run(sample_with_seeds):
        assert answers == alone
        assert "seed" in refused


def stop_differently(rank: int, world_size: int) -> tuple[Any, int, Any, Any]:
    document, query = request_ids(N, Q)
    engine = new_engine()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    stop = StopAfter(N + Q + (3 if rank == 0 else 1))
    stopped = engine.generate(document, query, stopping_criteria=StoppingCriteriaList([stop]), **options)
    limits = {"max_time": 0.1 if rank == 0 else 1e-9, "stopping_criteria": StoppingCriteriaList([Slow(0.06)])}
    timed = engine.generate(document, query, **limits, **options)
    after = engine.generate(document, query, **options)
    return stopped.tolist(), stop.asked, timed.tolist(), after.tolist()


def test_ranks_stop_at_the_same_token(pool: Pools) -> None:
    first, second = pool(2).run(stop_differently)
    stopped, asked, timed, after = first
    assert stopped == second[0]
    assert stopped[0] == after[0][:3]
    assert (asked, second[1]) == (3, 0)
    assert timed == second[2]
    assert 2 <= len(timed[0]) < 8  # the first rank's clock counts; the second's limit passed at once
    assert after == second[3]
    assert len(after[0]) == 8


def stream(rank: int, world_size: int) -> tuple[Any, Any]:
    document, query = request_ids(N, Q)
    streamer = Recorder()
    tokens = new_engine().generate(document, query, max_new_tokens=4, do_sample=False, streamer=streamer)
    return streamer.events, tokens[0].tolist()


def test_only_the_first_rank_streams(pool: Pools) -> None:
    (events, tokens), (silent, others) = pool(2).run(stream)
    prompt = torch.cat(request_ids(N, Q), dim=1).tolist()
    assert events == [prompt, *([token] for token in tokens), "end"]
    assert silent == []
    assert others == tokens


class BreaksAt(Recorder):
    """A streamer that fails at one event: 0 is the prompt, -1 the end."""

    def __init__(self, event: int) -> None:
        super().__init__()
        self.event = event

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.events) - 1 == self.event:
            raise BrokenPipeError("closed pipe")

    def end(self) -> None:
        if self.event == -1:
            raise BrokenPipeError("closed pipe")


def break_the_stream(rank: int, world_size: int) -> list[Any]:
    document, query = request_ids(N, Q)
    engine = new_engine()
    context = engine.prefill(document, query)
    options: dict[str, Any] = {"query_ids": query, "context": context, "max_new_tokens": 4, "do_sample": False}
    raised = []
    for event in (0, 1, 3, -1):
        try:
            engine.generate(append=True, streamer=BreaksAt(event), **options)
        except (BrokenPipeError, RuntimeError) as error:
            raised.append(type(error).__name__)
    return [raised, context.num_tokens, engine.generate(**options).tolist()]


def test_a_failing_streamer_fails_all_ranks(pool: Pools) -> None:
    first, second = pool(2).run(break_the_stream)
    assert first[0] == ["BrokenPipeError"] * 4
    assert second[0] == ["RuntimeError"] * 4
    assert first[1:] == second[1:]
    assert first[1] == N


def fail_then_ask_again(rank: int, world_size: int) -> list[Any]:
    """Fail at the first token and in the middle of an answer, on the first rank only; then ask again."""
    document, query = request_ids(N, Q)
    engine = new_engine()
    context = engine.prefill(document, query)
    before = engine.query_logits(query, context=context)
    options: dict[str, Any] = {"query_ids": query, "context": context, "max_new_tokens": 6, "do_sample": False}
    reports: list[Any] = []
    for length in (N + Q, N + Q + 3):
        processors = LogitsProcessorList([Fails(length)] if rank == 0 else [])
        try:
            engine.generate(append=True, logits_processor=processors, **options)
        except (ValueError, RuntimeError) as error:
            reports.append((type(error).__name__, str(error)))
    same = torch.equal(engine.query_logits(query, context=context), before)
    return [*reports, same, engine.generate(**options).tolist(), context.num_tokens, context.num_cached]


def test_a_failure_on_the_first_rank_fails_all_ranks(pool: Pools) -> None:
    first, second = pool(2).run(fail_then_ask_again)
    assert first[:2] == [("ValueError", "failure in the processor")] * 2
    assert [kind for kind, _ in second[:2]] == ["RuntimeError"] * 2
    assert all("first rank" in message for _, message in second[:2])
    assert first[2:] == second[2:]
    assert first[2] is True
    assert first[4:] == [N, N]
    assert first[3] == fail_then_ask_again(0, 1)[3]


BAD: list[dict[str, Any]] = [
    {"document_ids": "int32"},
    {"document_ids": "batch"},
    {"document_ids": "unknown"},
    {"query_ids": "empty"},
    {"num_beams": 2},
    {"use_cache": False},
    {"append": True},
    {"max_new_tokens": 0},
    {"max_new_tokens": 5000},
    {"query_length": 3},
]
SPOILED: dict[str, Any] = {
    "int32": lambda ids: ids.int(),
    "batch": lambda ids: ids.expand(2, -1),
    "unknown": lambda ids: ids + VOCAB_SIZE,
    "empty": lambda ids: ids[:, :0],
}


def give_bad_input(rank: int, world_size: int) -> tuple[list[Any], int, bool]:
    import apb_ds

    document, query = request_ids(N, Q)
    good = {"document_ids": document, "query_ids": query}
    engine = new_engine()
    before = engine.generate(**good, max_new_tokens=3, do_sample=False)
    sent = engine.group.bytes_sent
    messages = []
    for bad in BAD:
        arguments = {"max_new_tokens": 3, **good, **bad}
        arguments.update({name: SPOILED[how](good[name]) for name, how in bad.items() if isinstance(how, str)})
        try:
            engine.generate(**arguments)
        except ValueError as error:
            messages.append((next(iter(bad)), str(error)))
    for config in (apb_ds.APBConfig(hosts=3), apb_ds.APBConfig(compressor="query", anchor_length=4)):
        try:
            engine.configure(config)
            engine.prefill(document, query)
        except ValueError as error:
            messages.append(("hosts" if config.hosts == 3 else "anchor_length", str(error)))
    sent = engine.group.bytes_sent - sent
    engine.configure(apb_ds.APBConfig(**GIVEN))
    after = engine.generate(**good, max_new_tokens=3, do_sample=False)
    return messages, sent, torch.equal(before, after)


def test_bad_input_fails_everywhere_before_anything_is_sent(pool: Pools) -> None:
    for messages, sent, same in pool(2).run(give_bad_input):
        assert len(messages) == len(BAD) + 2
        for name, message in messages:
            assert name.removesuffix("_tokens") in message or "positions" in message, (name, message)
        assert sent == 0
        assert same


def ask_prompts(rank: int, world_size: int) -> tuple[list[Any], list[str]]:
    """Answer padded rows, one with a document and one without; then have the last rank spoil them."""
    import apb_ds

    engine = new_engine()
    engine.split = apb_ds.Split(min_document=N, last_ids=Q)
    prompt = torch.cat(request_ids(N, Q), dim=1)
    short = prompt[:, :20]
    rows = torch.cat([prompt, torch.cat([torch.zeros_like(prompt[:, 20:]), short], dim=1)])
    mask = torch.ones_like(rows)
    mask[1, :-20] = 0
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    answers = [
        engine.generate(rows, attention_mask=mask, **given).tolist(),
        [engine.generate(one, **given)[0].tolist() for one in (prompt, short)],
    ]
    is_last = rank == world_size - 1
    messages = []
    for spoiled in (
        {"attention_mask": mask.flip(1) if is_last else mask},
        {"query_length": 4 + is_last},
        {"inputs": rows if is_last else None},
    ):
        try:
            engine.generate(**{"input_ids": rows, "attention_mask": mask, **given, **spoiled})
        except ValueError as error:
            messages.append(str(error))
    return answers, messages


def test_prompts_are_the_same_on_all_ranks_or_refused_on_all(pool: Pools) -> None:
    alone, _ = ask_prompts(0, 1)
    (together, single) = alone
    assert [row[-4:] for row in together] == [row[-4:] for row in single]
    for answers, messages in pool(2).run(ask_prompts):
        assert answers == alone
        named = ["the right of row 1", "document lengths is", "not input_ids, inputs"]
        assert all(name in message for name, message in zip(named, messages, strict=True)), messages


def answer(engine: Any, seed: int) -> tuple[torch.Tensor, Any]:
    document, query = request_ids(N + 20 * seed, Q, seed)
    context = engine.prefill(document, query)
    tokens = engine.generate(document, query, max_new_tokens=5, do_sample=False)
    return engine.query_logits(query, context=context), tokens.tolist()


def serve_two_documents(rank: int, world_size: int) -> tuple[int, int, int, torch.Tensor, Any]:
    """Two groups of two ranks answer about different documents at the same time."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    import apb_ds

    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(2)
    engine = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(**GIVEN), mpu=parallel_state_sp)
    return engine.group.rank, engine.group.world_size, engine.group.bytes_sent, *answer(engine, rank // 2)


def test_sequence_parallel_groups_serve_a_document_each(pool: Pools) -> None:
    by_rank = pool(4).run(serve_two_documents)
    assert [rank for rank, *_ in by_rank] == [0, 1, 0, 1]
    engine = new_engine()
    for seed in (0, 1):
        logits, tokens = answer(engine, seed)
        (_, size, _, first, first_tokens), (_, _, _, second, second_tokens) = by_rank[2 * seed : 2 * seed + 2]
        assert size == 2
        assert torch.equal(first, second)
        assert float((first - logits).abs().max()) < 1e-4
        assert first_tokens == second_tokens == tokens
    assert by_rank[0][4] != by_rank[2][4]


def refuse_mpu(rank: int, world_size: int) -> str:
    import apb_ds

    with pytest.raises(ValueError) as caught:
        apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(**GIVEN), mpu="parallel")
    return str(caught.value)


def test_an_mpu_without_a_group_is_refused(pool: Pools) -> None:
    assert all("mpu=str" in message for message in pool(2).run(refuse_mpu))


def join_without_tokens(rank: int, world_size: int) -> tuple[list[int], torch.Tensor, Any]:
    """Fewer tokens than ranks and no anchor: some ranks run no forward in a round."""
    engine = new_engine(anchor_length=0, passing_length=2)
    document, query = request_ids(3, Q)
    context = engine.prefill(document, query)
    fed = [context.plan.num_forward_tokens(rank, k) for k in range(len(context.plan.rounds))]
    logits = engine.query_logits(query, context=context)
    return fed, logits, engine.generate(document, query, max_new_tokens=5, do_sample=False).tolist()


def test_an_idle_rank_joins(pool: Pools) -> None:
    _, logits, tokens = join_without_tokens(0, 1)
    by_rank = pool(4).run(join_without_tokens)
    assert sorted(sum(fed) for fed, _, _ in by_rank) == [0, 1, 1, 1]
    for _, of_rank, of_rank_tokens in by_rank:
        assert torch.equal(of_rank, by_rank[0][1])
        assert float((of_rank - logits).abs().max()) < 1e-4
        assert of_rank_tokens == tokens


def ask_for_logits(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two queries, the second after an appended turn; return the engine's logits and those that this rank computed."""
    document, query = request_ids(N, Q)
    engine = new_engine()
    context = engine.prefill(document, query)
    logits, own = [engine.query_logits(query, context=context)], [own_query_logits(engine, query, context)]
    engine.generate(query_ids=query, context=context, max_new_tokens=4, append=True, do_sample=False)
    logits.append(engine.query_logits(query.flip(1), context=context))
    own.append(own_query_logits(engine, query.flip(1), context))
    return torch.stack(logits), torch.stack(own), context.cache.local_lengths()[None]


@pytest.mark.parametrize("world_size", [2, 4])
def test_logits_are_the_same_on_all_ranks(pool: Pools, world_size: int) -> None:
    """The engine returns the first rank's logits, so all bits are equal; each rank's own are equal up to rounding."""
    by_rank = pool(world_size).run(ask_for_logits)
    alone, _, _ = ask_for_logits(0, 1)
    # The shards hold every token once; the last token of an answer is not cached yet.
    assert sum(length for _, _, length in by_rank) == N + Q + 3
    for logits, own, _ in by_rank:
        assert torch.equal(logits, by_rank[0][0])
        assert float((own - alone).abs().max()) < TOLERANCE
