"""Many queries about one document: answered one after the other, and together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from apb_ds.bench.config import BenchConfig
from apb_ds.bench.timing import Stopwatch, spread
from apb_ds.engine.context import Context
from apb_ds.engine.engine import APBEngine
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory

# A likeliest token each, as many as asked for: min_new_tokens would make a processor for every sequence.
PLAIN_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


@dataclass(frozen=True)
class Answers:
    """What it took one rank to answer some queries.

    Attributes
    ----------
    total_s : from the first query's submission to the last token of all
    first_token_s : for each query, from when all of them were asked to its first token
    step_s : mean of the forwards that give each running sequence a token, after the first
    peak_bytes : peak memory meanwhile
    """

    total_s: float
    first_token_s: tuple[float, ...]
    step_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Round:
    """Answers by the number of queries."""

    one_by_one: dict[int, Answers]
    together: dict[int, Answers]


def random_queries(number: int, num_tokens: int, vocab_size: int, seed: int) -> list[Tensor]:
    """Return queries of random ids, (1, num_tokens), int64, each; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(vocab_size, (number, num_tokens), generator=generator).split(1))


def answer_round(
    engine: APBEngine,
    context: Context,
    queries: Sequence[Tensor],
    sizes: Sequence[int],
    num_new: int,
    *,
    is_timed: bool,
) -> Round:
    """Answer the first queries of each size together, and all of them one by one.

    One by one, a size's time is that of the first so many queries, which are answered once for all sizes.

    Parameters
    ----------
    queries : (1, tokens), int64, on the model's device, as many as the largest size
    num_new : tokens of each answer, at least 2
    is_timed : False to have kernels compiled and steps recorded, for which one query of one by one is enough
    """
    asked = queries if is_timed else queries[:1]
    one_by_one = _answer_one_by_one(engine, context, asked, num_new)
    return Round(
        {size: one_by_one(size) for size in sizes} if is_timed else {1: one_by_one(1)},
        {size: _answer_together(engine, context, queries[:size], num_new) for size in sizes},
    )


def _answer_one_by_one(
    engine: APBEngine, context: Context, queries: Sequence[Tensor], num_new: int
) -> Callable[[int], Answers]:
    """Answer each query by itself; return what the first so many of them took."""
    reset_peak_memory(engine.device)
    decode_s = []
    watch = Stopwatch(engine.device)
    for query_ids in queries:
        engine.generate(query_ids=query_ids, context=context, max_new_tokens=num_new, **PLAIN_GREEDY)
        decode_s.append(engine.stats.decode_s)
        watch.mark()
    answer_s, peak = watch.laps(), peak_memory_bytes(engine.device)

    def first(number: int) -> Answers:
        waits = [sum(answer_s[: index + 1]) - decode_s[index] for index in range(number)]
        return Answers(sum(answer_s[:number]), tuple(waits), fmean(decode_s[:number]) / (num_new - 1), peak)

    return first


def _answer_together(engine: APBEngine, context: Context, queries: Sequence[Tensor], num_new: int) -> Answers:
    reset_peak_memory(engine.device)
    num_steps = 0
    watch = Stopwatch(engine.device)
    with engine.batch(len(queries)) as batch:
        handles = [
            batch.submit(query_ids, context=context, max_new_tokens=num_new, **PLAIN_GREEDY) for query_ids in queries
        ]
        while len(batch):
            batch.step()
            num_steps += 1
    watch.mark()
    for handle in handles:
        handle.result()  # raises what went wrong
    (total_s,) = watch.laps()
    waits = tuple(handle.wait_s for handle in handles)
    return Answers(total_s, waits, batch.stats.decode_s / num_steps, peak_memory_bytes(engine.device))


def summarise_rounds(bench: BenchConfig, rounds: Sequence[Sequence[Round]], slot_bytes: int) -> list[dict[str, Any]]:
    """Return the record of each number of queries: times of the slowest rank, memory of the fullest.

    Parameters
    ----------
    rounds : two untimed ones, of which the first one's memory counts, and the timed ones; each by rank
    slot_bytes : of a sequence on a rank
    """
    if not rounds:
        return []
    untimed, _, *timed = rounds
    num_new = bench.num_new_tokens
    records = []
    for size in timed[0][0].together:
        one_by_one = _summarise([[rank.one_by_one[size] for rank in ranks] for ranks in timed], size * num_new)
        together = _summarise([[rank.together[size] for rank in ranks] for ranks in timed], size * num_new)
        one_by_one["peak_memory_bytes"] = max(rank.one_by_one[1].peak_bytes for rank in untimed)
        together["peak_memory_bytes"] = max(rank.together[size].peak_bytes for rank in untimed)
        together["suffix_bytes"] = size * slot_bytes
        speedup = one_by_one["answers"]["median_s"] / together["answers"]["median_s"]
        records.append(
            {
                "sequences": size,
                "query_tokens": bench.query_tokens,
                "new_tokens": num_new,
                "one_by_one": one_by_one,
                "together": together,
                "speedup": speedup,
            }
        )
    return records


def _summarise(repeats: Sequence[Sequence[Answers]], num_tokens: int) -> dict[str, Any]:
    def slowest(value: Callable[[Answers], float]) -> list[float]:
        return [max(map(value, ranks)) for ranks in repeats]

    answers = spread(slowest(lambda rank: rank.total_s), "s")
    return {
        "answers": answers,
        "tokens_per_s": num_tokens / answers["median_s"],
        "step": spread([1000 * seconds for seconds in slowest(lambda rank: rank.step_s)], "ms"),
        "first_token_mean": spread(slowest(lambda rank: fmean(rank.first_token_s)), "s"),
        "first_token_worst": spread(slowest(lambda rank: max(rank.first_token_s)), "s"),
    }
