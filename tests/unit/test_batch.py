"""Many requests at once: each is answered as if it were alone, and fails, is cancelled and is freed alone."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

import apb_ds
from apb_ds.engine import packs
from apb_ds.engine.batch import Batch
from apb_ds.engine.sequences import Cancelled
from tests.engine_cases import TOLERANCE
from tests.generation_parts import Recorder, StopAfter
from tests.models import FAMILIES, HYBRIDS, VOCAB_SIZE, build_model
from tests.schedules import small_sizes
from tests.together import (
    DOCUMENTS,
    GIVEN,
    NEW,
    QUERIES,
    SAMPLED,
    alone,
    answers_alone,
    answers_together,
    ask_apart,
    differences,
    ids,
    same_shards,
)


@pytest.fixture(scope="module")
def engine() -> Any:
    return apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(**GIVEN))


@pytest.fixture
def context(engine: Any) -> Any:
    return engine.prefill(DOCUMENTS[0], max_positions=300)


@contextmanager
def counted_forwards(model: Any) -> Any:
    """Count the tokens of each forward of the model."""
    fed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = type(model).forward

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            fed.append(kwargs["input_ids"].shape[1])
            return forward(self, *args, **kwargs)

        patch.setattr(type(model), "forward", counting)
        yield fed


@contextmanager
def failing_forward(model: Any, at: int, error: Exception) -> Any:
    """Have one forward of the model fail in its last layer, once the others have stored their keys."""
    counts = [0]
    decoder = model.model.layers[-1].mlp

    def fail(*_: Any) -> None:
        counts[0] += 1
        if counts[0] == at:
            raise error

    hook = decoder.register_forward_pre_hook(fail)
    try:
        yield counts
    finally:
        hook.remove()


# --- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_every_family_answers_as_one_at_a_time(family: str) -> None:
    engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**GIVEN))
    expected = answers_alone(engine)
    assert 0 < len(expected["ends"]) < NEW
    found = answers_together(engine, end=expected["ends"][-1])
    assert differences(found, expected, TOLERANCE) == []


@pytest.mark.parametrize("family", ["llama", "dynamic_rope", "gemma3", "gemma3n", "gpt_oss", "deepseek_v3"])
def test_documents_that_nobody_shares_are_copied(family: str) -> None:
    engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**GIVEN))
    expected, found, copied = ask_apart(engine)
    assert found == expected and copied == [True] * 4
    assert all(slab.is_unused for slab in engine.pool._slabs.values())


def test_documents_are_not_copied_if_shared_or_long_or_with_turns_or_without_memory(engine: Any) -> None:
    shared, branched, turned, apart = (engine.prefill(ids(50, seed), max_positions=120) for seed in range(4))
    branch = branched.branch()
    long = engine.prefill(ids(61, 9), max_positions=120)
    engine.generate(query_ids=QUERIES[0], context=turned, max_new_tokens=2, append=True)
    asked = [shared, shared, branched, branch, long, turned, apart]
    expected = [alone(engine, QUERIES[1], context) for context in asked]
    with small_sizes():
        plain = engine.pool.bytes_for([QUERIES[1].shape[1]] + [1] * (NEW - 1))
    for most, copied in ((2**30, [False] * 6 + [True]), (7 * plain + 1, [False] * 7)):
        with small_sizes(), engine.batch(max_bytes=most) as batch:
            batch._max_copied = 60
            handles = [batch.submit(QUERIES[1], context=context, max_new_tokens=NEW) for context in asked]
            batch.run()
        assert [handle.copies_document for handle in handles] == copied
        assert [handle.tokens for handle in handles] == expected


def test_a_document_is_copied_only_where_steps_are_recorded(engine: Any, context: Any) -> None:
    with engine.batch() as batch:
        handle = batch.submit(QUERIES[0], context=context, max_new_tokens=2)
        batch.run()
    assert not handle.copies_document


def test_short_documents_share_one_forward(engine: Any) -> None:
    documents = [ids(length, length) for length in (5, 3, 8)]  # too short for an anchor: exact
    exact = apb_ds.init_inference(build_model("dynamic_rope"), apb_ds.APBConfig(hosts=1))
    expected = [
        exact.generate(document, query, max_new_tokens=5) for document, query in zip(documents, QUERIES, strict=False)
    ]
    with counted_forwards(exact.module) as fed:
        found = exact.generate(document_ids=documents, query_ids=QUERIES[:3], max_new_tokens=5)
    assert fed == [5 + 3 + 8 + 6 + 3 + 9, 3, 3, 3, 3]
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in expected]


def test_documents_of_a_list_are_prefilled_in_turn(engine: Any) -> None:
    documents = [*DOCUMENTS, ids(20, 3)]
    expected = [
        engine.generate(document, query, max_new_tokens=5)
        for document, query in zip(documents, QUERIES[:3], strict=True)
    ]
    found = engine.generate(document_ids=documents, query_ids=QUERIES[:3], max_new_tokens=5)
    assert all(map(torch.equal, found, expected))
    assert engine.stats.prefill_s > 0 and engine.stats.decode_s > 0 and engine.stats.new_tokens == 15


def test_many_queries_share_the_forwards_and_a_long_one_runs_alone(
    engine: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "QUERY_FORWARD_TOKENS", 10)
    queries = [ids(length, length) for length in (4, 6, 15, 3)]
    expected = [alone(engine, query, context, max_new_tokens=2) for query in queries]
    with counted_forwards(engine.module) as fed:
        found = engine.generate(query_ids=queries, context=context, max_new_tokens=2)
    assert fed == [10, 15, 3, 4]
    assert [tokens[0].tolist() for tokens in found] == expected


@pytest.mark.parametrize("family", ["llama", "dynamic_rope", "phi3_switching", "gemma3", "gpt_oss", "deepseek_v3"])
def test_queries_that_join_running_answers_come_between_their_steps(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward of at most so many tokens comes between two steps; a longer query is fed in parts."""
    engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**GIVEN))
    first, second = engine.prefill(DOCUMENTS[0], max_positions=300), engine.prefill(ids(30, 5), max_positions=300)
    queries = [ids(length, length) for length in (6, 25, 12, 4, 5, 20)]
    sources = [first, first, second, first, second, first.branch()]
    num_new = 12
    expected = [
        alone(engine, query, source, max_new_tokens=num_new) for query, source in zip(queries, sources, strict=True)
    ]
    monkeypatch.setattr(packs, "QUERY_FORWARD_TOKENS", 10)
    with engine.batch() as batch, counted_forwards(engine.module) as fed:

        def submit(index: int, **given: Any) -> Any:
            return batch.submit(queries[index], context=sources[index], max_new_tokens=num_new, **given)

        handles = [submit(0)]
        batch.step()
        handles += [submit(index, append=index == 5) for index in range(1, 6)]
        numbers = []
        while len(batch):
            del fed[:]
            batch.step()
            numbers.append((fed[0], len(handles[0].tokens)) if len(fed) == 2 else None)
            assert len(fed) <= 2
    assert numbers[:8] == [(10, 3), (10, 4), (5, 5), (10, 6), (2 + 4, 7), (5, 8), (10, 9), (10, 10)], numbers
    assert [handle.tokens for handle in handles] == expected
    assert all(handle.query_s > 0 for handle in handles)
    assert sources[5].num_tokens == 60 + 20 + len(expected[5])


def test_queries_that_nobody_waits_behind_are_fed_at_once(
    engine: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "QUERY_FORWARD_TOKENS", 10)
    with engine.batch() as batch, counted_forwards(engine.module) as fed:
        handle = batch.submit(ids(25, 1), context=context, max_new_tokens=2)
        batch.run()
    assert fed == [25, 1] and handle.tokens == alone(engine, ids(25, 1), context, max_new_tokens=2)


def test_a_query_that_is_cancelled_between_its_parts_is_freed(
    engine: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "QUERY_FORWARD_TOKENS", 10)
    with engine.batch() as batch, counted_forwards(engine.module) as fed:
        running = batch.submit(QUERIES[0], context=context, max_new_tokens=NEW)
        batch.step()
        long = batch.submit(ids(35, 1), context=context, max_new_tokens=NEW)
        batch.step()
        long.cancel()
        assert batch.step() == [long]
        with pytest.raises(Cancelled):
            long.result()
        batch.run()
        assert sum(fed) == QUERIES[0].shape[1] + 2 * 10 + NEW - 1
    assert running.tokens == alone(engine, QUERIES[0], context)
    assert all(slab.is_unused for slab in engine.pool._slabs.values())


# --- lists ----------------------------------------------------------------------------------------------------------


class Raises(LogitsProcessor):
    """Fails once the ids are so many."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.length:
            raise ZeroDivisionError("failure in a processor")
        return scores


class Breaks(Recorder):
    """A streamer that fails from the n-th event on, and when it is told the end."""

    def __init__(self, event: int) -> None:
        super().__init__()
        self.event = event

    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.events) > self.event:
            raise BrokenPipeError("closed")

    def end(self) -> None:
        raise BrokenPipeError("closed, too")


def test_an_error_is_its_requests_alone_and_results_come_in_order(engine: Any, context: Any) -> None:
    expected = [alone(engine, query, context) for query in QUERIES]
    n = context.num_tokens
    bad: list[tuple[Tensor, dict[str, Any], type[Exception], str]] = [
        (QUERIES[0].float(), {}, ValueError, "query_ids must be"),
        (QUERIES[0] + VOCAB_SIZE, {}, ValueError, "vocabulary"),
        (QUERIES[0], {"num_beams": 2}, ValueError, "num_beams"),
        (QUERIES[0], {"max_new_tokens": 5000}, ValueError, "positions"),
        (QUERIES[0], {"logits_processor": LogitsProcessorList([Raises(n)])}, ZeroDivisionError, "processor"),
        (QUERIES[0], {"logits_processor": LogitsProcessorList([Raises(n + 9)])}, ZeroDivisionError, "processor"),
        (QUERIES[0], {"streamer": Breaks(0)}, BrokenPipeError, "closed"),
        (QUERIES[0], {"streamer": Breaks(3)}, BrokenPipeError, "closed"),
        (QUERIES[0], {"streamer": Breaks(99)}, BrokenPipeError, "closed, too"),
        (QUERIES[0], {"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
        (QUERIES[0], {"unknown": 1}, ValueError, "unknown"),
        (QUERIES[0], {"append": True}, ValueError, "branch"),
    ]
    queries, settings = [*QUERIES[:2]], [{}, {}]
    for query, given, _, _ in bad:
        queries.append(query)
        settings.append(given)
    queries += QUERIES[2:]
    settings += [{}, {"max_new_tokens": 3}]
    found = engine.generate(query_ids=queries, context=context, settings=settings, max_new_tokens=NEW)
    assert [tokens.tolist()[0] for tokens in (*found[:2], *found[-2:])] == [*expected[:3], expected[3][:3]]
    for (_, given, kind, message), error in zip(bad, found[2:-2], strict=True):
        assert isinstance(error, kind) and message in str(error), (given, error)
    assert all(slab.is_unused for slab in engine.pool._slabs.values())


def test_lists_of_other_lengths_and_arguments_for_one_query_are_refused(engine: Any, context: Any) -> None:
    for given, named in [
        ({"context": [context]}, "context has 1"),
        ({"context": context, "settings": [{}]}, "settings has 1"),
        ({"document_ids": [DOCUMENTS[0]]}, "document_ids has 1"),
        ({"context": context, "query_length": 3}, "query_length"),
        ({"context": context, "input_ids": DOCUMENTS[0]}, "input_ids"),
    ]:
        with pytest.raises(ValueError, match=named):
            engine.generate(query_ids=QUERIES, **given)
    with pytest.raises(ValueError, match="settings"):
        engine.generate(query_ids=QUERIES[0], context=context, settings=[{}])
    assert engine.generate(query_ids=[], context=context) == []


@pytest.mark.parametrize("settings", [{"seed": 1}, [None, {}], ["a", {}], [{}, {"context": None}]], ids=str)
def test_settings_of_another_form_are_refused(engine: Any, context: Any, settings: Any) -> None:
    with pytest.raises(ValueError, match="settings"):
        engine.generate(query_ids=[ids(3, 1), ids(3, 2)], context=context, settings=settings)


def test_logits_of_a_list_are_those_of_each(engine: Any, context: Any) -> None:
    other = engine.prefill(DOCUMENTS[1])
    contexts = [context, other, context, other]
    found = engine.query_logits(QUERIES, context=contexts)
    for logits, query, source in zip(found, QUERIES, contexts, strict=True):
        assert logits.shape == (1, query.shape[1], VOCAB_SIZE) and logits.dtype == torch.float32
        assert float((logits - engine.query_logits(query, context=source)).abs().max()) < TOLERANCE
    assert engine.query_logits([], context=[]) == []
    for queries, contexts in ([QUERIES[0], QUERIES[1][:, :0]], context), (QUERIES, [context]):
        with pytest.raises(ValueError, match=r"query_ids\[1\]|context has 1"):
            engine.query_logits(queries, context=contexts)


def test_streamers_get_prompt_tokens_and_end(engine: Any, context: Any) -> None:
    streamers = [Recorder() for _ in range(4)]
    settings = [{"streamer": streamer} for streamer in streamers]
    settings[1] |= {"seed": 4, **SAMPLED}
    settings[2] |= {"logits_processor": LogitsProcessorList([Raises(context.num_tokens + 9 + 2)])}
    settings[3] |= {"num_beams": 3}
    found = engine.generate(query_ids=QUERIES, context=context, settings=settings, max_new_tokens=4)
    for index in (0, 1):
        prompt = torch.cat([DOCUMENTS[0], QUERIES[index]], dim=1)
        assert streamers[index].events == [prompt.tolist(), *([token] for token in found[index][0].tolist()), "end"]
    assert len(streamers[2].events) == 1 + 2 + 1 and streamers[2].events[-1] == "end"
    assert streamers[3].events == ["end"], "whoever reads it does not wait forever"


def test_criteria_and_stop_strings_end_their_request(engine: Any, context: Any) -> None:
    class Tokenizer:
        def decode(self, token_ids: list[int], **_: Any) -> str:
            return "".join(f"<{token}>" for token in token_ids)

    expected = [alone(engine, query, context) for query in QUERIES]
    stop = expected[1][3]
    settings: list[dict[str, Any]] = [{} for _ in QUERIES]
    settings[0]["stopping_criteria"] = StoppingCriteriaList([StopAfter(context.num_tokens + 6 + 2)])
    settings[1] |= {"stop_strings": [f"<{stop}>"], "tokenizer": Tokenizer()}
    found = engine.generate(query_ids=QUERIES, context=context, settings=settings, max_new_tokens=NEW)
    expected[0] = expected[0][:2]
    expected[1] = expected[1][: expected[1].index(stop) + 1]
    assert [tokens[0].tolist() for tokens in found] == expected


# --- cancelling, closing --------------------------------------------------------------------------------------------


def test_cancelling_ends_waiting_and_running_requests(engine: Any, context: Any) -> None:
    expected = [alone(engine, query, context) for query in QUERIES]
    with engine.batch(max_sequences=2) as batch:
        handles = [batch.submit(query, context=context, max_new_tokens=NEW) for query in QUERIES]
        assert batch.step() == [] and len(batch) == 4
        with pytest.raises(RuntimeError, match="has not ended"):
            handles[0].result()
        handles[0].cancel()
        handles[2].cancel()
        ended = batch.step()
        assert ended == [handles[2], handles[0]]  # the one that waits, too
        batch.run()
        assert len(batch) == 0
    for index, handle in enumerate(handles):
        if index in (0, 2):
            with pytest.raises(Cancelled):
                handle.result()
            assert handle.tokens == expected[index][: len(handle.tokens)]
        else:
            assert handle.result().tolist() == [expected[index]]
    assert len(handles[0].tokens) == 2 and not handles[2].tokens


def test_a_streamer_can_cancel_its_own_request(engine: Any, context: Any) -> None:
    class Impatient(Recorder):
        handle: Any = None

        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.events) == 4:
                self.handle.cancel()

    streamer = Impatient()
    with engine.batch() as batch:
        streamer.handle = batch.submit(QUERIES[0], context=context, max_new_tokens=NEW, streamer=streamer)
        other = batch.submit(QUERIES[1], context=context, max_new_tokens=NEW)
        batch.run()
    assert isinstance(streamer.handle.error, Cancelled)
    assert len(streamer.handle.tokens) == 3 and streamer.events[-1] == "end"
    assert other.tokens == alone(engine, QUERIES[1], context)


def test_closing_a_batch_ends_all_requests_and_frees_them(engine: Any, context: Any) -> None:
    branch = context.branch()
    with engine.batch(max_sequences=1) as batch:
        running = batch.submit(QUERIES[0], context=branch, append=True, max_new_tokens=NEW)
        waiting = batch.submit(QUERIES[1], context=context, max_new_tokens=NEW)
        batch.step()
    assert all(isinstance(handle.error, Cancelled) and handle.is_done for handle in (running, waiting))
    assert not branch.is_busy and branch.suffix is None and branch.num_tokens == context.num_tokens
    assert all(slab.is_unused for slab in engine.pool._slabs.values())


def test_a_closed_batch_takes_no_more(engine: Any, context: Any) -> None:
    recorder = Recorder()
    with engine.batch() as batch:
        batch.submit(QUERIES[0], context=context, max_new_tokens=2)
        batch.run()
    with pytest.raises(RuntimeError, match=r"closed.*engine\.batch"):
        batch.submit(QUERIES[0], context=context, streamer=recorder)
    assert recorder.events == ["end"]
    with pytest.raises(RuntimeError, match="closed"):
        batch.prefill(DOCUMENTS[0])
    with pytest.raises(RuntimeError, match="closed"):
        batch.step()
    batch.close()
    assert len(batch) == 0


# --- branches -------------------------------------------------------------------------------------------------------


def test_branches_and_their_context_go_different_ways(engine: Any) -> None:
    context, plain = (engine.prefill(DOCUMENTS[0], max_positions=200) for _ in range(2))
    branch, other = context.branch(), context.branch()
    assert (branch.number, other.number, branch.plan, branch.key) == (1, 2, context.plan, context.key)
    before = alone(engine, QUERIES[2], plain)
    assert alone(engine, QUERIES[0], branch) == alone(engine, QUERIES[0], plain)
    assert branch.num_tokens == 60 and branch.num_cached == 60, "without append nothing is kept"
    first = alone(engine, QUERIES[0], branch, append=True)
    alone(engine, QUERIES[1], other, append=True)
    with engine.batch() as batch:  # a running sequence, while the context gets a turn
        running = batch.submit(QUERIES[2], context=context, max_new_tokens=NEW)
        batch.step()
        alone(engine, QUERIES[3], context, append=True)
        batch.run()
    assert running.tokens == before
    assert first == alone(engine, QUERIES[0], plain, append=True)
    assert branch.num_tokens == plain.num_tokens == branch.num_cached + 1
    assert torch.equal(branch.token_ids, plain.token_ids)
    third = context.branch()
    assert torch.equal(third.token_ids, context.token_ids), "it begins with the context's turns"
    turn = alone(engine, QUERIES[1], branch, append=True)
    assert turn == alone(engine, QUERIES[1], plain, append=True)
    assert alone(engine, QUERIES[2], third) == alone(engine, QUERIES[2], context)


def test_a_branch_is_freed_alone_and_its_slots_are_reused(engine: Any, context: Any) -> None:
    branches = [context.branch() for _ in range(2)]
    for branch in branches:
        alone(engine, QUERIES[0], branch, append=True)
    used, taken = engine.pool.num_bytes, branches[0].suffix.places[None].slot
    expected = alone(engine, QUERIES[1], branches[1])
    with branches[0]:
        pass
    assert branches[0].suffix is None and branches[0].num_tokens == branches[0].num_cached == 0
    again = context.branch()
    alone(engine, QUERIES[0], again, append=True)
    assert again.suffix.places[None].slot == taken and engine.pool.num_bytes == used
    del again, branch
    gc.collect()
    assert alone(engine, QUERIES[1], branches[1]) == expected
    branches[1].free()
    assert all(slab.is_unused for slab in engine.pool._slabs.values())


def test_a_freed_branch_is_refused(engine: Any, context: Any) -> None:
    branch = context.branch()
    alone(engine, QUERIES[0], branch, append=True)
    other = context.branch()
    with engine.batch(max_sequences=1) as batch:
        running = batch.submit(QUERIES[1], context=branch, append=True, max_new_tokens=3)
        waiting = batch.submit(QUERIES[1], context=branch, max_new_tokens=3)
        batch.step()
        branch.free()
        with pytest.raises(ValueError, match=r"freed.*context\.branch"):
            batch.submit(QUERIES[0], context=branch)
        batch.run()
    assert len(running.tokens) == 3 and branch.suffix is None, "its turn is not kept"
    assert isinstance(waiting.error, ValueError)
    with pytest.raises(ValueError, match="freed"):
        engine.generate(query_ids=QUERIES[0], context=branch)
    with pytest.raises(ValueError, match="freed"):
        engine.query_logits([QUERIES[0]] * 2, context=[other, branch])
    with pytest.raises(ValueError, match="freed"):
        branch.branch()
    branch.free()
    assert all(slab.is_unused for slab in engine.pool._slabs.values())


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_a_branch_of_a_branch_starts_from_its_turns(family: str) -> None:
    engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**GIVEN))
    context, plain = (engine.prefill(DOCUMENTS[0], max_positions=200) for _ in range(2))
    branch = context.branch()
    assert alone(engine, QUERIES[2], branch.branch()) == alone(engine, QUERIES[2], plain)
    alone(engine, QUERIES[0], branch, append=True)
    alone(engine, QUERIES[0], plain, append=True)
    further = branch.branch()
    assert further.number == 3 and torch.equal(further.token_ids, branch.token_ids)
    alone(engine, QUERIES[3], branch, append=True)
    branch.free()
    for query in QUERIES[1:3]:
        assert alone(engine, query, further, append=True) == alone(engine, query, plain, append=True)
    assert torch.equal(further.token_ids, plain.token_ids)


def test_a_busy_branch_takes_no_second_turn(engine: Any, context: Any) -> None:
    branch = context.branch()
    with engine.batch() as batch:
        kept = batch.submit(QUERIES[0], context=branch, append=True, max_new_tokens=3)
        with pytest.raises(ValueError, match="another request appends"):
            batch.submit(QUERIES[1], context=branch, append=True)
        with pytest.raises(ValueError, match="another request appends"):
            engine.generate(query_ids=QUERIES[1], context=branch, append=True)
        beside = batch.submit(QUERIES[1], context=branch, max_new_tokens=NEW)
        with pytest.raises(ValueError, match=r"context\.branch"):
            batch.submit(QUERIES[1], context=context, append=True)
        batch.run()
        assert not branch.is_busy
        failing = LogitsProcessorList([Raises(branch.num_tokens + 3)])
        failed = batch.submit(QUERIES[1], context=branch, append=True, logits_processor=failing)
        batch.run()
    assert beside.tokens == alone(engine, QUERIES[1], context), "it joined before the turn was kept"
    assert isinstance(failed.error, ZeroDivisionError) and not branch.is_busy
    assert branch.token_ids.tolist() == [[*DOCUMENTS[0][0].tolist(), *QUERIES[0][0].tolist(), *kept.tokens]]


def test_a_request_whose_branch_changes_before_it_joins_is_refused(engine: Any, context: Any) -> None:
    branch = context.branch()
    with engine.batch(max_sequences=1) as batch:
        batch.submit(QUERIES[0], context=branch, append=True, max_new_tokens=3)
        late = batch.submit(QUERIES[1], context=branch, max_new_tokens=3)
        other = batch.submit(QUERIES[1], context=context, max_new_tokens=NEW)
        batch.run()
    assert isinstance(late.error, ValueError) and "changed" in str(late.error)
    assert other.tokens == alone(engine, QUERIES[1], context)


def test_a_branch_and_a_context_are_not_pickled(context: Any) -> None:
    with pytest.raises(TypeError, match="Branch cannot be pickled"):
        pickle.dumps(context.branch())


def test_a_branch_of_another_engine_is_refused(context: Any) -> None:
    other = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(**GIVEN))
    with other.batch() as batch, pytest.raises(ValueError, match="another engine"):
        batch.submit(QUERIES[0], context=context.branch())


def test_an_entry_of_a_list_that_is_no_tensor_fails_alone(engine: Any, context: Any) -> None:
    queries: list[Any] = [QUERIES[0], [1, 2], None, QUERIES[1]]
    found = engine.generate(query_ids=queries, context=context, max_new_tokens=3)
    assert [type(one) for one in found] == [Tensor, ValueError, ValueError, Tensor]
    assert "query_ids must be an int64 tensor" in str(found[1]) and "query_ids is missing" in str(found[2])
    assert found[3][0].tolist() == alone(engine, QUERIES[1], context, max_new_tokens=3)


# --- admission ------------------------------------------------------------------------------------------------------


def test_no_more_than_max_sequences_run_at_a_time(engine: Any, context: Any) -> None:
    expected = [alone(engine, query, context, max_new_tokens=3) for query in QUERIES]
    with engine.batch(max_sequences=3) as batch, counted_forwards(engine.module) as fed:
        handles = [batch.submit(query, context=context, max_new_tokens=3) for query in QUERIES]
        batch.run()
    assert fed == [18, 3, 3, 1, 1, 1]
    assert [handle.tokens for handle in handles] == expected
    for value in (0, -1, True, 1.5, None):
        with pytest.raises(ValueError, match="max_sequences"):
            engine.batch(value)


def test_requests_wait_for_memory_or_are_refused(engine: Any, context: Any) -> None:
    expected = [alone(engine, query, context, max_new_tokens=3) for query in QUERIES]
    with small_sizes():
        two = 2 * engine.pool.bytes_for([6, 1, 1])
        with engine.batch(max_bytes=two) as batch, counted_forwards(engine.module) as fed:
            with pytest.raises(ValueError, match=r"needs 0 MiB|the batch has"):
                batch.submit(QUERIES[0], context=context, max_new_tokens=200)
            handles = [batch.submit(query, context=context, max_new_tokens=3) for query in QUERIES]
            batch.run()
    assert fed[0] == 6 + 3 and max(fed[1:]) == 9, "two fit at a time; the third needs the room of both"
    assert [handle.tokens for handle in handles] == expected


def test_a_document_counts_while_its_request_runs(engine: Any) -> None:
    document, query = DOCUMENTS[0], QUERIES[0]
    needed = engine.pool.bytes_for([6, 1, 1]) + engine.pool.document_bytes(60)
    with engine.batch(max_bytes=needed - 1) as batch, pytest.raises(ValueError, match="the batch has"):
        batch.submit(query, document_ids=document, max_new_tokens=3)
    with engine.batch(max_bytes=needed) as batch:
        handles = [batch.submit(query, document_ids=document, max_new_tokens=3) for _ in range(2)]
        batch.step()
        assert [len(handle.tokens) for handle in handles] == [2, 0]
        batch.run()
    assert handles[0].tokens == handles[1].tokens == engine.generate(document, query, max_new_tokens=3)[0].tolist()


def test_a_branch_alone_that_needs_too_much_memory_is_refused(
    engine: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apb_ds.engine.batch.available_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match="the batch has"):
        engine.generate(query_ids=QUERIES[0], context=context.branch(), max_new_tokens=3)


def test_an_answer_longer_than_its_slot_goes_on(engine: Any, context: Any) -> None:
    expected = [alone(engine, query, context, max_new_tokens=30) for query in QUERIES]
    with small_sizes() as patch, engine.batch() as batch:
        new = type(engine.pool).new
        patch.setattr(type(engine.pool), "new", lambda self, _, *rest: new(self, [1], *rest))  # announced: one
        handles = [batch.submit(query, context=context, max_new_tokens=30) for query in QUERIES]
        batch.run()
    assert [handle.tokens for handle in handles] == expected


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_step_that_failed_can_be_tried_again(engine: Any, context: Any) -> None:
    expected = [alone(engine, query, context) for query in QUERIES]
    with engine.batch() as batch:
        handles = [batch.submit(query, context=context, max_new_tokens=NEW) for query in QUERIES]
        with failing_forward(engine.module, 3, RuntimeError("a kernel failed")):
            batch.step()
            with pytest.raises(RuntimeError, match="a kernel failed"):
                batch.step()
            assert [len(handle.tokens) for handle in handles] == [2] * 4
            batch.run()
    assert [handle.tokens for handle in handles] == expected


def test_a_query_whose_forward_fails_ends_without_the_others(engine: Any, context: Any) -> None:
    with engine.batch() as batch:
        first = batch.submit(QUERIES[0], context=context, max_new_tokens=NEW)
        batch.step()
        with failing_forward(engine.module, 1, torch.OutOfMemoryError("no memory")):
            failed = batch.submit(QUERIES[1], context=context, max_new_tokens=NEW)
            assert batch.step() == [failed]
        batch.run()
    assert isinstance(failed.error, torch.OutOfMemoryError) and "max_sequences" in str(failed.error)
    assert first.tokens == alone(engine, QUERIES[0], context)


def test_memory_that_runs_out_in_a_step_within_a_prefill_is_told_by_the_next_step(engine: Any, context: Any) -> None:
    expected, plain = alone(engine, QUERIES[0], context), engine.prefill(DOCUMENTS[1])
    with engine.batch(step_every_s=0.0) as batch:
        handle = batch.submit(QUERIES[0], context=context, max_new_tokens=NEW)
        batch.step()
        feed = packs.run_forward

        def runs_out(*_: Any) -> Tensor:
            raise torch.OutOfMemoryError("no memory")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packs, "run_forward", runs_out)
            other = batch.prefill(DOCUMENTS[1])
        assert packs.run_forward is feed and len(handle.tokens) == 2
        with pytest.raises(torch.OutOfMemoryError):
            batch.step()
        batch.run()
    assert handle.tokens == expected
    assert alone(engine, QUERIES[1], other) == alone(engine, QUERIES[1], plain)


# --- steps within a prefill -----------------------------------------------------------------------------------------

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("apb", "phi3_switching", GIVEN),
    ("apb, shared keys", "gemma3n", GIVEN),
    ("heads", "phi3_switching", {**GIVEN, "compressor": "retaining_heads"}),
    ("heads and window", "qwen3", {**GIVEN, "compressor": "heads_and_window"}),
    ("query", "gemma3", {**GIVEN, "compressor": "query"}),
    ("star", "dynamic_rope", {"method": "star", "hosts": 4}),
    ("ring", "gemma3", {"method": "ring"}),
    ("ulysses", "phi3_switching", {"method": "ulysses"}),
    ("dense", "gpt_oss", {"method": "dense"}),
]


def engine_of(family: str, given: dict[str, Any]) -> Any:
    from tests.heads import engine_with_heads

    if "heads" not in given.get("compressor", ""):
        return apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**given))
    engine = engine_with_heads(build_model(family))
    engine.configure(apb_ds.APBConfig(**given))
    return engine


@pytest.mark.parametrize(("family", "given"), [case[1:] for case in CASES], ids=[name for name, *_ in CASES])
def test_steps_within_a_prefill_change_neither(family: str, given: dict[str, Any]) -> None:
    engine = engine_of(family, given)
    context = engine.prefill(DOCUMENTS[0], QUERIES[0], max_positions=100)
    plain = engine.prefill(DOCUMENTS[1], QUERIES[1])
    expected = [alone(engine, query, context, max_new_tokens=20) for query in QUERIES]
    asked = alone(engine, QUERIES[1], plain)
    with engine.batch(step_every_s=0.0) as batch:
        handles = [batch.submit(query, context=context, max_new_tokens=20) for query in QUERIES]
        late = batch.submit(QUERIES[1], document_ids=DOCUMENTS[1], max_new_tokens=NEW)
        batch.step()
        num_before = len(handles[0].tokens)
        done: list[tuple[int, int]] = []
        within = batch.prefill(DOCUMENTS[1], QUERIES[1], progress=lambda *counts: done.append(counts))
        num_steps = len(handles[0].tokens) - num_before
        batch.run()
    assert 1 < num_steps <= len(done) and done[-1][0] == done[-1][1]
    assert same_shards(within, plain, engine.layers)
    assert alone(engine, QUERIES[1], within) == asked
    assert [handle.tokens for handle in handles] == expected
    assert late.tokens == engine.generate(DOCUMENTS[1], QUERIES[1], max_new_tokens=NEW)[0].tolist()


def test_steps_within_a_prefill_come_as_often_as_is_asked(
    engine: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that one layer moves by a second, and a step by none."""
    now = [0.0]
    monkeypatch.setattr("apb_ds.engine.pace.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(type(engine), "_now", lambda self: now[0])
    layers = []

    def tick(done: int, total: int) -> None:
        layers.append(done)
        now[0] += 1.0

    counts = []
    for step_every_s in (0.5, 3.0, 1000.0):
        layers.clear()
        with engine.batch(step_every_s=step_every_s) as batch:
            handle = batch.submit(QUERIES[0], context=context, max_new_tokens=100)
            batch.step()
            before = len(handle.tokens)
            batch.prefill(DOCUMENTS[1], progress=tick)
            counts.append(len(handle.tokens) - before)
    assert counts == [len(layers), 1 + (len(layers) - 1) // 3, 1]


def test_what_a_batch_says_of_time(engine: Any, context: Any) -> None:
    with engine.batch() as batch:
        assert isinstance(batch, Batch)
        handle = batch.submit(QUERIES[0], context=context, max_new_tokens=4)
        batch.run()
    assert 0 < handle.query_s <= handle.wait_s and handle.decode_s > 0
    assert batch.stats.new_tokens == 4 and batch.stats.query_s > 0 and batch.stats.decode_s > 0


def test_a_model_is_left_as_it_was(engine: Any, context: Any) -> None:
    def state(model: Any) -> tuple[Any, ...]:
        hooks: Callable[[Any], tuple[int, int]] = lambda m: (len(m._forward_hooks), len(m._forward_pre_hooks))  # noqa: E731
        return model.config._attn_implementation, [(m.__dict__.get("forward"), hooks(m)) for m in model.modules()]

    before = state(engine.module)
    with engine.batch(step_every_s=0.0) as batch:
        batch.submit(QUERIES[0], context=context, max_new_tokens=NEW)
        batch.step()
        batch.prefill(DOCUMENTS[1])
    assert state(engine.module) == before
