"""A prefill over ranks that are not there: each rank's share in turn, in one process; and what sending would take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apb_ds.bench.config import BenchConfig
from apb_ds.bench.timing import Spread, Stopwatch
from apb_ds.engine.engine import APBEngine
from apb_ds.parallel.emulated import EmulatedGroup
from apb_ds.plan import Plan
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory


@dataclass(frozen=True)
class RankRun:
    """One rank's share of one prefill.

    Attributes
    ----------
    round_s : seconds of each round, all of them computation
    round_collectives : how many collectives each round has
    bytes_sent : what a real rank would send
    peak_memory_bytes : of this rank alone
    plan : how the document was split
    """

    rank: int
    round_s: tuple[float, ...]
    round_collectives: tuple[int, ...]
    bytes_sent: int
    peak_memory_bytes: int
    plan: Plan

    @property
    def compute_s(self) -> float:
        return sum(self.round_s)

    @property
    def num_collectives(self) -> int:
        return sum(self.round_collectives)


def run_rank(engine: APBEngine, document_ids: Tensor, query_ids: Tensor) -> RankRun:
    """Prefill as the rank that `engine.group` is, an `EmulatedGroup`."""
    group = engine.group
    assert isinstance(group, EmulatedGroup)
    num_layers = engine.sizes.num_layers
    collectives = [group.num_collectives]
    reset_peak_memory(engine.device)
    watch = Stopwatch(engine.device)

    def progress(done: int, total: int) -> None:
        if done % num_layers == 0:
            watch.mark()
            collectives.append(group.num_collectives)

    context = engine.prefill(document_ids, query_ids, progress=progress)
    return RankRun(
        rank=group.rank,
        round_s=tuple(watch.laps()),
        round_collectives=tuple(after - before for before, after in itertools.pairwise(collectives)),
        bytes_sent=context.bytes_sent,
        peak_memory_bytes=peak_memory_bytes(engine.device),
        plan=context.plan,
    )


def communication_s(bench: BenchConfig, run: RankRun) -> float:
    """Return what sending would take by the link model: every byte over the link, and a latency per collective."""
    return run.bytes_sent / (bench.link_gb_per_s * 1e9) + run.num_collectives * bench.link_latency_us / 1e6


def in_step_s(ranks: Sequence[RankRun]) -> float:
    """Return the computation of one prefill whose ranks wait for each other, as collectives make them do.

    A round with collectives has some in every layer, so it begins when all are there and is as slow as its slowest
    rank. Through a round without any, each rank goes on by itself.
    """
    clocks = [0.0] * len(ranks)
    for index in range(len(ranks[0].round_s)):
        times = [run.round_s[index] for run in ranks]
        if any(run.round_collectives[index] for run in ranks):
            clocks = [max(clocks) + max(times)] * len(ranks)
        else:
            clocks = [clock + time for clock, time in zip(clocks, times, strict=True)]
    return max(clocks)


def summarise_ranks(bench: BenchConfig, runs: Sequence[Sequence[RankRun]]) -> dict[str, Any]:
    """Return what an emulated case says, as JSON has it.

    ``prefill``: the computation of the slowest rank, in each run. ``in_step``: see `in_step_s`. ``estimate_s``: from a
    prefill whose communication hides behind computation to one that hides none of it.

    Parameters
    ----------
    runs : by repeat, then by rank
    """
    slowest = Spread.of([max(run.compute_s for run in ranks) for ranks in runs])
    in_step = Spread.of([in_step_s(ranks) for ranks in runs])
    last = runs[-1]
    sending = [communication_s(bench, run) for run in last]
    return {
        "prefill": slowest.as_dict("s"),
        "in_step": in_step.as_dict("s"),
        "communication_s": max(sending),
        "estimate_s": [in_step.median, in_step.median + max(sending)],
        "prefill_bytes_sent": [run.bytes_sent for run in last],
        "peak_memory_bytes": max(run.peak_memory_bytes for ranks in runs for run in ranks),
        "emulated_ranks": [
            {
                "rank": rank,
                "hosts": list(last[rank].plan.hosts_of(rank)),
                "compute": Spread.of([ranks[rank].compute_s for ranks in runs]).as_dict("s"),
                "round_median_s": [
                    Spread.of([ranks[rank].round_s[index] for ranks in runs]).median
                    for index in range(len(last[rank].round_s))
                ],
                "bytes_sent": last[rank].bytes_sent,
                "collectives": last[rank].num_collectives,
                "communication_s": sending[rank],
                "peak_memory_bytes": max(ranks[rank].peak_memory_bytes for ranks in runs),
            }
            for rank in range(len(last))
        ],
    }


def slowest_rank(runs: Sequence[Sequence[RankRun]]) -> int:
    """Return the rank whose computation takes longest, by its median."""
    medians = [Spread.of([ranks[rank].compute_s for ranks in runs]).median for rank in range(len(runs[-1]))]
    return medians.index(max(medians))
