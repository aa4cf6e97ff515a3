"""A prefill over emulated ranks: each rank's share in turn, in one process; and by a model the time to send."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from apb_ds.bench.config import BenchConfig
from apb_ds.bench.timing import Stopwatch, spread
from apb_ds.engine.engine import APBEngine
from apb_ds.parallel.emulated import EmulatedGroup
from apb_ds.plan import Plan
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.utils.sizes import num_prefilled


@dataclass(frozen=True)
class EmulatedTimes:
    """One emulated rank's share of one prefill.

    Attributes
    ----------
    round_s : seconds of computation in each round
    round_collectives : number of collectives in each round
    bytes_sent : what a real rank would send, without weights
    peak_memory_bytes : of this rank alone
    plan : how the document was split
    gathered_bytes, num_gathers : of sharded weights
    """

    rank: int
    round_s: tuple[float, ...]
    round_collectives: tuple[int, ...]
    bytes_sent: int
    peak_memory_bytes: int
    plan: Plan
    gathered_bytes: int = 0
    num_gathers: int = 0

    @property
    def compute_s(self) -> float:
        return sum(self.round_s)

    @property
    def num_collectives(self) -> int:
        return sum(self.round_collectives)


def time_emulated_rank(engine: APBEngine, document_ids: Tensor, query_ids: Tensor) -> EmulatedTimes:
    """Prefill as the rank of `engine.group`, an `EmulatedGroup`."""
    group = engine.group
    assert isinstance(group, EmulatedGroup)
    num_layers = num_prefilled(engine.layers)
    gathers = None if engine.weights is None else engine.weights.gatherer.group
    if not isinstance(gathers, EmulatedGroup):  # a rank with a copy to itself gathers nothing
        gathers = None
    before = (0, 0) if gathers is None else (gathers.bytes_sent, gathers.num_collectives)
    collectives = [group.num_collectives]
    reset_peak_memory(engine.device)
    watch = Stopwatch(engine.device)

    def progress(done: int, total: int) -> None:
        if done % num_layers == 0:
            watch.mark()
            collectives.append(group.num_collectives)

    context = engine.prefill(document_ids, query_ids, progress=progress)
    return EmulatedTimes(
        rank=group.rank,
        round_s=tuple(watch.laps()),
        round_collectives=tuple(after - before for before, after in itertools.pairwise(collectives)),
        bytes_sent=context.bytes_sent,
        gathered_bytes=0 if gathers is None else gathers.bytes_sent - before[0],
        num_gathers=0 if gathers is None else gathers.num_collectives - before[1],
        peak_memory_bytes=peak_memory_bytes(engine.device),
        plan=context.plan,
    )


def sending_s(bench: BenchConfig, num_bytes: int, num_collectives: int) -> float:
    """Return the seconds of sending by the link model: every byte over the link, and a latency per collective."""
    return num_bytes / (bench.link_gb_per_s * 1e9) + num_collectives * bench.link_latency_us / 1e6


def communication_s(bench: BenchConfig, times: EmulatedTimes) -> float:
    """Return the seconds of sending all but weights."""
    return sending_s(bench, times.bytes_sent, times.num_collectives)


def gather_s(bench: BenchConfig, times: EmulatedTimes) -> float:
    """Return the seconds of gathering weights."""
    return sending_s(bench, times.gathered_bytes, times.num_gathers)


def in_step_s(ranks: Sequence[EmulatedTimes]) -> float:
    """Return the seconds of computation of one prefill in which collectives keep the ranks in step.

    A round with collectives, those that gather weights included, has some in every layer, so it starts when all ranks
    are there and takes as long as its slowest rank. In a round without any, each rank goes on by itself.
    """
    clocks = [0.0] * len(ranks)
    for index in range(len(ranks[0].round_s)):
        times = [rank.round_s[index] for rank in ranks]
        if any(rank.round_collectives[index] or rank.num_gathers for rank in ranks):
            clocks = [max(clocks) + max(times)] * len(ranks)
        else:
            clocks = [clock + time for clock, time in zip(clocks, times, strict=True)]
    return max(clocks)


def summarise_ranks(bench: BenchConfig, repeats: Sequence[Sequence[EmulatedTimes]]) -> dict[str, Any]:
    """Return the record of an emulated case.

    ``prefill``: the slowest rank's computation, in each repeat. ``in_step``: see `in_step_s`. ``estimate_s``: the time
    of a prefill that hides all communication behind computation, and of one that hides none. ``gathers``: what sharded
    weights add, part of the latter estimate.

    Parameters
    ----------
    repeats : by repeat, then by rank
    """
    in_step = spread([in_step_s(ranks) for ranks in repeats], "s")
    sending = [communication_s(bench, times) for times in repeats[-1]]
    last = repeats[-1][0]
    gathering = gather_s(bench, last)
    return {
        "prefill": spread([max(times.compute_s for times in ranks) for ranks in repeats], "s"),
        "in_step": in_step,
        "communication_s": max(sending),
        "gathers": {"number": last.num_gathers, "bytes_sent": last.gathered_bytes, "s": gathering},
        "estimate_s": [in_step["median_s"], in_step["median_s"] + max(sending) + gathering],
        "prefill_bytes_sent": [times.bytes_sent for times in repeats[-1]],
        "peak_memory_bytes": max(times.peak_memory_bytes for ranks in repeats for times in ranks),
        "emulated_ranks": [
            {
                "rank": rank,
                "hosts": list(of_rank[-1].plan.hosts_of(rank)),
                "compute": spread([times.compute_s for times in of_rank], "s"),
                "round_median_s": [
                    median(of_round) for of_round in zip(*(times.round_s for times in of_rank), strict=True)
                ],
                "bytes_sent": of_rank[-1].bytes_sent,
                "collectives": of_rank[-1].num_collectives,
                "communication_s": sending[rank],
                "peak_memory_bytes": max(times.peak_memory_bytes for times in of_rank),
            }
            for rank, of_rank in enumerate(zip(*repeats, strict=True))
        ],
    }


def slowest_rank(repeats: Sequence[Sequence[EmulatedTimes]]) -> int:
    """Return the rank with the longest median computation."""
    medians = [median(times.compute_s for times in of_rank) for of_rank in zip(*repeats, strict=True)]
    return medians.index(max(medians))
