"""One run of one case: a document prefilled, a query asked about it, tokens decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apb_ds.bench import plain
from apb_ds.bench.breakdown import measure_parts
from apb_ds.bench.cases import Case
from apb_ds.bench.clocks import read_clocks
from apb_ds.bench.config import BenchConfig
from apb_ds.bench.emulate import EmulatedTimes, slowest_rank, time_emulated_rank
from apb_ds.bench.interleaving import Interruption, interrupt
from apb_ds.bench.sequences import Round, answer_round
from apb_ds.bench.timing import Stopwatch
from apb_ds.compressors.base import needs_heads
from apb_ds.compressors.retaining_heads import RetainingHeads
from apb_ds.engine.engine import APBEngine
from apb_ds.parallel.emulated import EmulatedGroup, emulated_groups
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.tasks import Sample


@dataclass(frozen=True)
class RankTimes:
    """What one run of a case took on one rank.

    Attributes
    ----------
    prefill_s, query_s, decode_s : seconds; of the query up to the first token, of decoding the further ones
    prefill_peak_bytes, peak_bytes : peak memory of the prefill, and of the whole run
    prefill_bytes_sent, answer_bytes_sent : to other ranks
    plan : None for the plain model
    """

    prefill_s: float
    query_s: float | None
    decode_s: float | None
    prefill_peak_bytes: int
    peak_bytes: int
    prefill_bytes_sent: int = 0
    answer_bytes_sent: int = 0
    plan: Plan | None = None


@dataclass
class CaseResult:
    """All timed runs of a case.

    Attributes
    ----------
    kernels : by phase; None for the plain model
    ranks : by repeat, then by rank; empty for an emulated case
    emulated : the same for an emulated case
    rounds : of many queries, two untimed ones first; by rank
    slot_bytes : of one of their sequences on a rank
    apart, interleaved : prefills while sequences wait or go on, by repeat, then by rank
    clocks : of the device after each run, None if they cannot be read
    allocated_before_bytes : on CUDA, memory allocated before the last run: the weights, and what other cases hold
    breakdown : by rank, as `measure_parts` returns it
    error : why there is nothing (more) to measure
    """

    case: Case
    kernels: dict[str, str] | None
    ranks: list[list[RankTimes]] = field(default_factory=list)
    emulated: list[list[EmulatedTimes]] = field(default_factory=list)
    rounds: list[list[Round]] = field(default_factory=list)
    slot_bytes: int = 0
    apart: list[list[Interruption]] = field(default_factory=list)
    interleaved: list[list[Interruption]] = field(default_factory=list)
    clocks: list[dict[str, float | None] | None] = field(default_factory=list)
    allocated_before_bytes: int | None = None
    breakdown: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def is_measured(self) -> bool:
        """Whether there is anything to report, even if only an error."""
        return bool(self.ranks or self.emulated or self.error)


class Runner:
    """Runs cases with one model and one engine, whose settings change from case to case.

    Parameters
    ----------
    heads : for the cases whose compressor needs them
    """

    def __init__(
        self, engine: APBEngine, group: SequenceGroup, bench: BenchConfig, heads: RetainingHeads | None = None
    ) -> None:
        self.engine, self.group, self.bench, self._heads = engine, group, bench, heads
        self._emulated: dict[Case, list[EmulatedGroup]] = {}

    def set_up(self, case: Case, rank: int = 0) -> dict[str, str] | None:
        """Configure the engine for a case, as the given rank if ranks are emulated; return the kernels it uses.

        Raises
        ------
        ValueError, RuntimeError
            For settings that the model or the machine cannot serve.
        """
        if case.config is None:
            return None
        if case.emulated and case not in self._emulated:
            self._emulated[case] = emulated_groups(case.ranks)
        self.engine.group = self._emulated[case][rank] if case.emulated else self.group
        heads = None
        if needs_heads(case.config.compressor):
            heads, self._heads = self._heads, None  # the engine keeps them, on its device
        self.engine.configure(case.config, heads)
        return self.engine.kernel_names

    def forget(self) -> None:
        """Free what emulated ranks were sent."""
        self._emulated.clear()

    def run(self, result: CaseResult, sample: Sample, *, is_timed: bool) -> None:
        """Run a case once, on all ranks together or on each emulated rank in turn; keep the times if `is_timed`."""
        case, device = result.case, self.engine.device
        allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        if case.emulated:
            emulated = []
            for rank in range(case.ranks):
                self.set_up(case, rank)
                emulated.append(time_emulated_rank(self.engine, sample.document_ids, sample.query_ids))
            result.emulated += [emulated] if is_timed else []
        else:
            self.set_up(case)
            self.group.barrier()
            time = self._time_plain if case.config is None else self._time_engine
            times = time(case, sample.document_ids.to(device), sample.query_ids.to(device))
            gathered = list(self.group.gather_objects(times))
            result.ranks += [gathered] if is_timed else []
        if is_timed:
            result.clocks.append(read_clocks(device))
            result.allocated_before_bytes = allocated

    def ask_many(self, result: CaseResult, sample: Sample, queries: Sequence[Tensor], other: Sample) -> None:
        """Answer queries about a document one by one and together, and while another document is prefilled.

        First untimed, for compiled kernels and recorded steps: queries twice, since more of them at once need longer
        slabs, for which steps of fewer are recorded again.

        Parameters
        ----------
        queries : (1, tokens), int64, as many as the most of `bench.sequences`
        other : whose document is prefilled meanwhile
        """
        bench, engine, device = self.bench, self.engine, self.engine.device
        self.set_up(result.case)
        queries = [query_ids.to(device) for query_ids in queries]
        document_ids, other_ids = sample.document_ids.to(device), other.document_ids.to(device)
        context = engine.prefill(document_ids, queries[0], max_positions=bench.num_positions(result.case.length))
        result.slot_bytes = engine.pool.bytes_for([bench.query_tokens] + [1] * bench.decode_tokens)
        sizes, num_new = sorted(bench.sequences), bench.num_new_tokens
        for repeat in range(-2, bench.repeats):
            self.group.barrier()
            here = answer_round(engine, context, queries, sizes, num_new, is_timed=repeat >= 0)
            result.rounds.append(list(self.group.gather_objects(here)))
        for repeat in range(-1, bench.repeats if bench.interleave else -1):
            for is_interleaved, found in ((False, result.apart), (True, result.interleaved)):
                self.group.barrier()
                interruption = interrupt(engine, context, queries, other_ids, is_interleaved=is_interleaved)
                gathered = list(self.group.gather_objects(interruption))
                found += [gathered] if repeat >= 0 else []

    def break_down(self, result: CaseResult, sample: Sample) -> None:
        """Measure the parts of a prefill on each rank, or on the slowest emulated one."""
        case, model, device = result.case, self.engine.module, self.engine.device
        rank = slowest_rank(result.emulated) if result.emulated else self.group.rank
        self.set_up(case, rank if case.emulated else 0)
        document_ids, query_ids = sample.document_ids.to(device), sample.query_ids.to(device)
        if case.config is None:
            with plain.linears_of(model, case.method, case.length):
                parts = measure_parts(model, lambda: plain.prefill(model, document_ids), is_plain=True)
        else:
            parts = measure_parts(model, lambda: self.engine.prefill(document_ids, query_ids))
        here = {"rank": rank, **parts}
        result.breakdown = [here] if case.emulated else list(self.group.gather_objects(here))

    def _time_plain(self, case: Case, document_ids: Tensor, query_ids: Tensor) -> RankTimes:
        model, device = self.engine.module, self.engine.device
        reset_peak_memory(device)
        watch = Stopwatch(device)
        with plain.linears_of(model, case.method, case.length):
            cache = plain.prefill(model, document_ids)
        watch.mark()
        (prefill_s,) = watch.laps()
        prefill_peak = peak_memory_bytes(device)
        query_s, decode_s = None, None
        if self.bench.num_new_tokens:
            query_s, decode_s = plain.answer(model, cache, query_ids, self.bench.num_new_tokens)
        return RankTimes(prefill_s, query_s, decode_s, prefill_peak, peak_memory_bytes(device))

    def _time_engine(self, case: Case, document_ids: Tensor, query_ids: Tensor) -> RankTimes:
        engine, num_new = self.engine, self.bench.num_new_tokens
        reset_peak_memory(engine.device)
        watch = Stopwatch(engine.device)
        positions = document_ids.shape[1] + query_ids.shape[1] + num_new
        context = engine.prefill(document_ids, query_ids, max_positions=positions)
        watch.mark()
        (prefill_s,) = watch.laps()
        prefill_peak = peak_memory_bytes(engine.device)
        query_s, decode_s, sent_before = None, None, self.group.bytes_sent
        if num_new:
            engine.generate(
                query_ids=query_ids, context=context, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
            )
            query_s, decode_s = engine.stats.query_s, engine.stats.decode_s
        return RankTimes(
            prefill_s=prefill_s,
            query_s=query_s,
            decode_s=decode_s,
            prefill_peak_bytes=prefill_peak,
            peak_bytes=peak_memory_bytes(engine.device),
            prefill_bytes_sent=context.bytes_sent,
            answer_bytes_sent=self.group.bytes_sent - sent_before,
            plan=context.plan,
        )
