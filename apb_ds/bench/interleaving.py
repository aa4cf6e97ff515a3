"""Gaps between the tokens of running sequences while another document is prefilled."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from apb_ds.bench.config import INTERLEAVED_TOKENS
from apb_ds.bench.sequences import PLAIN_GREEDY
from apb_ds.bench.timing import spread
from apb_ds.engine.batch import STEP_EVERY_S
from apb_ds.engine.context import Context
from apb_ds.engine.engine import APBEngine

STEPS_BEFORE = 4  # the prefill, so that steps are recorded where they can be


@dataclass(frozen=True)
class Interruption:
    """A prefill while sequences run, on one rank.

    Attributes
    ----------
    prefill_s : seconds, with the steps inside it
    gaps_s : between tokens, from the last one before the prefill to the first one after it; on the first rank only
    """

    prefill_s: float
    gaps_s: tuple[float, ...]


def interrupt(
    engine: APBEngine, context: Context, queries: Sequence[Tensor], document_ids: Tensor, *, is_interleaved: bool
) -> Interruption:
    """Prefill a document while queries about another one are answered.

    Parameters
    ----------
    queries : (1, tokens), int64, each
    document_ids : (1, n), int64
    is_interleaved : whether the sequences' steps go on between the layers of the prefill, or wait for its end
    """
    clock = _Clock()
    with engine.batch(len(queries)) as batch:
        for number, query_ids in enumerate(queries):
            streamer = clock if number == 0 else None  # every step gives every sequence a token
            arguments = {**PLAIN_GREEDY, "streamer": streamer}
            batch.submit(query_ids, context=context, max_new_tokens=INTERLEAVED_TOKENS, **arguments)
        for _ in range(STEPS_BEFORE):
            batch.step()
        began = time.perf_counter()
        prefill = batch.prefill if is_interleaved else engine.prefill
        prefill_s = prefill(document_ids).prefill_s
        ended = time.perf_counter()
        batch.step()
    return Interruption(prefill_s, gaps_around(clock.times, began, ended))


def gaps_around(times: Sequence[float], began: float, ended: float) -> tuple[float, ...]:
    """Return the differences of ascending times, from the last one before `began` to the first one after `ended`."""
    first, last = max(0, bisect_left(times, began) - 1), bisect_right(times, ended)
    return tuple(after - before for before, after in itertools.pairwise(times[first : last + 1]))


def summarise_interruptions(
    apart: Sequence[Sequence[Interruption]], interleaved: Sequence[Sequence[Interruption]], num_sequences: int
) -> dict[str, Any] | None:
    """Return the record of prefills without and with steps inside, each by repeat and then by rank; None of none."""
    if not apart:
        return None
    records = [_summarise(apart), _summarise(interleaved)]
    slowdown = records[1]["prefill"]["median_s"] / records[0]["prefill"]["median_s"]
    return {
        "sequences": num_sequences,
        "step_every_s": STEP_EVERY_S,
        "apart": records[0],
        "interleaved": records[1],
        "slowdown": slowdown,
    }


def _summarise(repeats: Sequence[Sequence[Interruption]]) -> dict[str, Any]:
    gaps = [ranks[0].gaps_s for ranks in repeats]
    return {
        "prefill": spread([max(rank.prefill_s for rank in ranks) for ranks in repeats], "s"),
        "worst_gap": spread([max(of_repeat) for of_repeat in gaps], "s"),
        "mean_gap": spread([fmean(of_repeat) for of_repeat in gaps], "s"),
        "gaps": [len(of_repeat) for of_repeat in gaps],
    }


class _Clock:
    """A streamer that notes when its tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._has_prompt = False

    def put(self, _: Tensor) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """The sequence has ended."""
