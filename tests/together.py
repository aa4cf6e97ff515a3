"""Questions that an engine answers one at a time or together: two documents, late ones, sampling, ends and turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models import request_ids
from tests.schedules import small_sizes

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 8, "compression_ratio": 4}
NEW = 8
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.5}


def ids(length: int, seed: int) -> Tensor:
    return request_ids(length, 1, seed)[0]


DOCUMENTS = [ids(60, 1), ids(45, 2)]
QUERIES = [ids(length, 10 + length) for length in (6, 3, 9, 1)]


def alone(engine: Any, query: Tensor, context: Any, **arguments: Any) -> list[int]:
    arguments = {"max_new_tokens": NEW, **arguments}
    tokens: list[int] = engine.generate(query_ids=query, context=context, **arguments)[0].tolist()
    return tokens


def _contexts(engine: Any) -> list[Any]:
    return [engine.prefill(document, max_positions=120) for document in DOCUMENTS]


def answers_alone(engine: Any) -> dict[str, Any]:
    """Return the answers of lone calls, by name."""
    contexts = _contexts(engine)
    asked = [(query, contexts[index % 2]) for index, query in enumerate(QUERIES)]
    found: dict[str, Any] = {
        "greedy": [alone(engine, *pair, max_new_tokens=6 + index) for index, pair in enumerate(asked)],
        "sampled": [alone(engine, *pair, seed=index, **SAMPLED) for index, pair in enumerate(asked)],
    }
    end = found["greedy"][3][2]
    found["ends"] = alone(engine, *asked[3], eos_token_id=end)
    found["turns"] = [alone(engine, query, contexts[0], append=True) for query in QUERIES[:2]]
    found["logits"] = engine.query_logits(QUERIES[2], context=contexts[0])
    return found


def answers_together(engine: Any, end: int) -> dict[str, Any]:
    """Return the same from a batch, in slots that overflow and pages that change hands.

    Parameters
    ----------
    end : the token that ends the answer that ends early
    """
    contexts = _contexts(engine)
    asked = [(query, contexts[index % 2]) for index, query in enumerate(QUERIES)]
    branch, other = contexts[0].branch(), contexts[0].branch()
    with small_sizes(), engine.batch() as batch:

        def ask(index: int, **given: Any) -> Any:
            query, context = asked[index]
            return batch.submit(query, **{"context": context, "max_new_tokens": NEW, **given})

        greedy = [ask(index, max_new_tokens=6 + index) for index in (0, 1)]
        turns = [ask(0, context=branch, append=True)]
        batch.step()
        batch.step()
        greedy += [ask(index, max_new_tokens=6 + index) for index in (2, 3)]
        sampled = [ask(index, seed=index, **SAMPLED) for index in range(4)]
        ends = ask(3, eos_token_id=end)
        ask(2, context=other, append=True)
        batch.run()
        turns.append(ask(1, context=branch, append=True))
        batch.run()
        logits = engine.query_logits([QUERIES[2], QUERIES[0]], context=[branch, other])
    return {
        "greedy": [handle.tokens for handle in greedy],
        "sampled": [handle.tokens for handle in sampled],
        "ends": ends.tokens,
        "turns": [handle.tokens for handle in turns],
        "logits": logits[0],
    }


def ask_apart(engine: Any) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    """Ask one question about each of several documents, which are copied to the questions' own tokens.

    Returns
    -------
    The answers of lone calls and of a batch, in slots that overflow and pages that change hands; which were copied
    """
    documents = [*DOCUMENTS, ids(52, 3), ids(9, 4)]
    contexts = [engine.prefill(document, max_positions=120) for document in documents]
    asked = list(zip(QUERIES, contexts, strict=True))
    expected = [alone(engine, *pair, max_new_tokens=9 + index) for index, pair in enumerate(asked)]
    with small_sizes(), engine.batch() as batch:
        batch._max_copied = 60
        handles = []
        for index, (query, context) in enumerate(asked):
            handles.append(batch.submit(query, context=context, max_new_tokens=9 + index))
            batch.step()
        batch.run()
    return expected, [handle.tokens for handle in handles], [handle.copies_document for handle in handles]


def differences(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> list[str]:
    """Return the names of what differs."""
    wrong = [name for name in expected if name != "logits" and found[name] != expected[name]]
    is_close = float((found["logits"] - expected["logits"]).abs().max()) < tolerance
    return wrong if is_close else [*wrong, "logits"]


def same_shards(first: Any, second: Any, layers: Any) -> bool:
    """Whether two contexts hold the same on this rank, bit by bit."""
    pairs = [
        pair
        for layer_idx, layer in enumerate(layers)
        if layer.stores and first.cache.layer(layer_idx).local_length
        for pair in zip(first.cache.layer(layer_idx).shard(), second.cache.layer(layer_idx).shard(), strict=True)
    ]
    return bool(pairs) and all(torch.equal(one, other) for one, other in pairs)
