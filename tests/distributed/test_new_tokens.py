"""Where the tokens after a document are stored: on all ranks in turn, and the answers do not depend on it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.engine_cases import TOLERANCE, own_query_logits
from tests.models import build_model, distinct_ids, llama, request_ids
from tests.pool import Pools

CHUNK, TURNS, N = 1024, 32, 200
PAGE, MOST_FED = 4, 7


def one_layer() -> Any:
    """A model so small that it reads 32K tokens in seconds."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    return llama(num_hidden_layers=1, max_position_embeddings=2**16, **shape)


def chunks() -> list[torch.Tensor]:
    """The turns of a long conversation, which with the token before them are a chunk each."""
    ids = distinct_ids(N + TURNS * CHUNK)[:, N:]
    return [ids[:, start + 1 : start + CHUNK] for start in range(0, ids.shape[1], CHUNK)]


def converse_at_length(rank: int, world_size: int) -> tuple[list[int], int, int]:
    """Return the answers, one token each, and how many tokens and bytes this rank stores more than of the document."""
    import apb_ds

    engine = apb_ds.init_inference(one_layer(), apb_ds.APBConfig(method="ring"))
    context = engine.prefill(distinct_ids(N), max_positions=N + (TURNS + 1) * CHUNK)
    before, answers = context.cache.local_lengths()[None], []
    for chunk in chunks():
        answers += engine.generate(query_ids=chunk, context=context, append=True, max_new_tokens=1, do_sample=False)[0]
    return torch.stack(answers).tolist(), context.cache.local_lengths()[None] - before, context.cache.num_bytes


def test_a_long_conversation_fills_all_ranks_alike(pool: Pools) -> None:
    by_rank = pool(4).run(converse_at_length, timeout=120)
    alone, everything, all_bytes = converse_at_length(0, 1)
    turns = [torch.cat([chunk, torch.tensor([[token]])], dim=1) for chunk, token in zip(chunks(), alone, strict=True)]
    whole = torch.cat([distinct_ids(N), *turns], dim=1)
    with torch.no_grad():
        plain = one_layer()(whole[:, :-1]).logits[0, N + CHUNK - 2 :: CHUNK].argmax(dim=-1)
    assert alone == plain.tolist() and len(set(alone)) > TURNS // 2
    for answers, _, num_bytes in by_rank:
        assert answers == alone
        assert num_bytes < 1.2 * all_bytes / 4
    stored = [num_stored for _, num_stored, _ in by_rank]
    assert sum(stored) == everything == TURNS * CHUNK - 1
    assert max(stored) - min(stored) <= CHUNK


def ask_at_length(rank: int, world_size: int) -> tuple[bool, int]:
    """Return whether a rank has kept its buffers, and how many tokens of a question and its answer it stores."""
    import apb_ds

    document, query = distinct_ids(N), distinct_ids(1500)
    engine = apb_ds.init_inference(one_layer(), apb_ds.APBConfig(hosts=2, anchor_length=0))
    context = engine.prefill(document, query)
    before, length = context.cache.buffers(), context.cache.local_lengths()[None]
    engine.generate(query_ids=query, context=context, append=True, max_new_tokens=20, do_sample=False)
    kept = all(one is other for one, other in zip(before, context.cache.buffers(), strict=True))
    return kept, context.cache.local_lengths()[None] - length


def test_there_is_room_for_a_question_in_one_piece_and_its_answer(pool: Pools) -> None:
    assert pool(2).run(ask_at_length) == [(True, 19), (True, 1500)]


def converse(rank: int, world_size: int, family: str) -> tuple[list[Any], list[torch.Tensor], int | None]:
    """Ask and keep turns, with other questions between them; return all tokens, this rank's logits, and its shard."""
    import apb_ds

    document, query = request_ids(101, MOST_FED)
    tokens, logits = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb_ds.cache.PAGE_TOKENS", PAGE)
        engine = apb_ds.init_inference(build_model(family), apb_ds.APBConfig(hosts=4, anchor_length=12))
        context = engine.prefill(document, query)
        for ids, append in ((query, True), (query[:, :1], False), (query[:, :2], True), (query[:, :3], True)):
            options: dict[str, Any] = {"context": context, "append": append, "max_new_tokens": 13, "do_sample": False}
            tokens.append(engine.generate(query_ids=ids, **options).tolist())
            logits.append(own_query_logits(engine, query.flip(1), context))
    return tokens, logits, context.cache.local_lengths().get(None)


@cache
def alone(family: str) -> tuple[list[Any], list[torch.Tensor], int | None]:
    return converse(0, 1, family)


@pytest.mark.parametrize(
    ("family", "world_size"),
    [("llama", 2), ("llama", 4), ("gpt_oss", 4), ("gemma3n", 2), ("deepseek_v3", 4), ("mistral_window", 4)],
)
def test_answers_do_not_depend_on_who_stores_them(pool: Pools, family: str, world_size: int) -> None:
    tokens, logits, everything = alone(family)
    by_rank = pool(world_size).run(converse, family, timeout=120)
    for found, own, _ in by_rank:
        assert found == tokens
        assert all(float((one - other).abs().max()) < TOLERANCE for one, other in zip(own, logits, strict=True))
    stored = [length for _, _, length in by_rank if length is not None]
    if everything is None:
        assert not stored, "layers with windows alone"
    else:
        assert sum(stored) == everything and max(stored) - min(stored) <= PAGE + MOST_FED


def fail_in_a_layer(rank: int, world_size: int) -> tuple[list[Any], list[Any]]:
    """A turn fails when it has filled some layers, in a forward that would have been another rank's."""
    import apb_ds

    document, query = request_ids(101, MOST_FED)
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb_ds.cache.PAGE_TOKENS", PAGE)
        engine = apb_ds.init_inference(build_model("gemma2"), apb_ds.APBConfig(hosts=4, anchor_length=12))
        for fails in (False, True):
            context = engine.prefill(document, query)
            options: dict[str, Any] = {"context": context, "append": True, "max_new_tokens": 9, "do_sample": False}
            found = [engine.generate(query_ids=query, **options).tolist()]
            if fails:
                hook = engine.module.model.layers[2].register_forward_pre_hook(fail_once)
                with pytest.raises(RuntimeError, match="failed in a layer"):
                    engine.generate(query_ids=query[:, :5], **options)
                hook.remove()
            answers.append([*found, engine.generate(query_ids=query[:, :2], **options).tolist()])
    return answers[0], answers[1]


def fail_once(*_: Any) -> None:
    raise RuntimeError("failed in a layer")


def test_a_forward_that_failed_leaves_the_ranks_agreed(pool: Pools) -> None:
    expected = fail_in_a_layer(0, 1)[0]
    for usual, after_failure in pool(2).run(fail_in_a_layer):
        assert usual == after_failure == expected
