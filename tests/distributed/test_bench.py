"""A benchmark over two real ranks: one record on both, and the traffic that an emulation says."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from apb_ds.bench import run_bench
from apb_ds.engine.engine import APBEngine
from tests.bench_cases import tiny
from tests.pool import Pools

METHODS = ["apb", "star", "ring", "ulysses"]


def measure(rank: int, world_size: int, bench: dict[str, Any]) -> dict[str, Any]:
    return run_bench(tiny(**bench))[0]


def measure_tokens(rank: int, world_size: int) -> tuple[dict[str, Any], list[list[int]]]:
    """A benchmark of many queries, and the tokens of every answer in it."""
    asked: list[list[int]] = []
    generate = APBEngine.generate

    def note(engine: APBEngine, *args: Any, **kwargs: Any) -> Any:
        asked.append(generate(engine, *args, **kwargs)[0].tolist())
        return torch.tensor([asked[-1]])

    with mock.patch.object(APBEngine, "generate", note):
        record = run_bench(tiny(methods=["apb"], sequences=[1, 3], interleave=True, repeats=2, warmup=0))[0]
    return record, asked


def refused(rank: int, world_size: int) -> str:
    try:
        run_bench(tiny(methods=["dense"]))
    except ValueError as error:
        return str(error)
    return ""


def test_a_benchmark(pool: Pools) -> None:
    records = pool(2).run(measure, {"methods": METHODS, "repeats": 1, "breakdown": True}, timeout=120)
    assert records[0]["cases"] == records[1]["cases"]
    emulated = run_bench(tiny(methods=METHODS, repeats=1, emulate_ranks=2))[0]
    for case, other in zip(records[0]["cases"], emulated["cases"], strict=True):
        assert (case["method"], case["ranks"], case["emulated"]) == (other["method"], 2, False)
        assert case["prefill_bytes_sent"] == other["prefill_bytes_sent"] and min(case["prefill_bytes_sent"]) > 0
        assert max(case["answer_bytes_sent"]) > 0
        assert [parts["rank"] for parts in case["breakdown"]] == [0, 1]
        assert all(parts["parts_s"]["communication"] > 0 for parts in case["breakdown"])


def test_many_queries(pool: Pools) -> None:
    (record, asked), (other, also_asked) = pool(2).run(measure_tokens, timeout=120)
    assert record["cases"] == other["cases"] and asked == also_asked
    (case,) = record["cases"]
    assert [found["sequences"] for found in case["sequences"]] == [1, 3]
    assert len(case["interleaving"]["interleaved"]["gaps"]) == 2


def test_dense_over_two_ranks_is_refused_on_both(pool: Pools) -> None:
    assert all("dense runs on one rank, and there are 2" in message for message in pool(2).run(refused))
