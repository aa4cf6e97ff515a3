"""One run of one case: a document prefilled, a query asked about it, tokens decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from apb_ds.bench import plain
from apb_ds.bench.breakdown import measure_parts
from apb_ds.bench.cases import Case
from apb_ds.bench.clocks import read_clocks
from apb_ds.bench.config import BenchConfig
from apb_ds.bench.emulate import RankRun, run_rank
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
class Run:
    """What one run of a case took on this rank.

    Attributes
    ----------
    prefill_s, query_s, decode_s : seconds; of the query until the first token, of decoding all further ones
    prefill_peak_bytes, peak_bytes : memory while prefilling, and over all
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
class Runs:
    """All timed runs of a case.

    Attributes
    ----------
    ranks : by repeat, then by rank; of an emulated case none
    emulated : the same of an emulated case
    clocks : of the device after each run, None where there are none
    allocated_before_bytes : on CUDA, what was allocated before the last run: weights, and what other cases keep
    breakdown : by rank, as `measure_parts` returns it
    error : why there is nothing (more) to measure
    """

    case: Case
    kernels: dict[str, str] | None
    ranks: list[list[Run]] = field(default_factory=list)
    emulated: list[list[RankRun]] = field(default_factory=list)
    clocks: list[dict[str, float | None] | None] = field(default_factory=list)
    allocated_before_bytes: int | None = None
    breakdown: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def is_measured(self) -> bool:
        """Whether there is anything to say of the case, be it an error."""
        return bool(self.ranks or self.emulated or self.error)


class Runner:
    """Runs cases with one model and one engine, which changes its settings from case to case.

    Parameters
    ----------
    group : the ranks that there are
    heads : for the cases whose compressor needs them
    """

    def __init__(
        self, engine: APBEngine, group: SequenceGroup, bench: BenchConfig, heads: RetainingHeads | None = None
    ) -> None:
        self.engine, self.group, self.bench, self._heads = engine, group, bench, heads
        self._emulated: dict[Case, list[EmulatedGroup]] = {}

    def set_up(self, case: Case, rank: int = 0) -> None:
        """Have the engine ready for a case, as one of its ranks where they are emulated.

        Raises
        ------
        ValueError, RuntimeError
            For settings that the model or the machine cannot serve.
        """
        if case.config is None:
            return
        self.engine.group = self._groups(case)[rank] if case.emulated else self.group
        heads = None
        if needs_heads(case.config.compressor):
            heads, self._heads = self._heads, None  # the engine keeps them, on its device
        self.engine.configure(case.config, heads)

    def kernels(self, case: Case) -> dict[str, str] | None:
        """Return the kernels that a case, set up before, runs with."""
        return None if case.config is None else self.engine.kernel_names

    def forget(self) -> None:
        """Free what emulated ranks were sent."""
        self._emulated.clear()

    def run(self, case: Case, sample: Sample) -> list[Run]:
        """Run a case once, all ranks together; return what it took on each."""
        self.set_up(case)
        self.group.barrier()
        run = self._run_plain(case, sample) if case.config is None else self._run_engine(sample)
        return list(self.group.gather_objects(run))

    def run_emulated(self, case: Case, sample: Sample) -> list[RankRun]:
        """Run the share of each rank of a case in turn."""
        runs = []
        for rank in range(case.ranks):
            self.set_up(case, rank)
            runs.append(run_rank(self.engine, sample.document_ids, sample.query_ids))
        return runs

    def break_down(self, case: Case, sample: Sample, rank: int = 0) -> list[dict[str, Any]]:
        """Return the parts of a prefill, of each rank that there is; of an emulated case, of the given one."""
        self.set_up(case, rank)
        model, device = self.engine.module, self.engine.device
        document_ids, query_ids = sample.document_ids.to(device), sample.query_ids.to(device)
        if case.config is None:
            with plain.linears_of(model, case.method, case.length):
                return [{"rank": 0, **measure_parts(model, lambda: plain.prefill(model, document_ids), is_plain=True)}]
        parts = measure_parts(model, lambda: self.engine.prefill(document_ids, query_ids))
        here = {"rank": rank if case.emulated else self.group.rank, **parts}
        return [here] if case.emulated else list(self.group.gather_objects(here))

    def clocks(self) -> dict[str, float | None] | None:
        return read_clocks(self.engine.device)

    def allocated_bytes(self) -> int | None:
        device = self.engine.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else None

    def _groups(self, case: Case) -> list[EmulatedGroup]:
        if case not in self._emulated:
            self._emulated[case] = emulated_groups(case.ranks)
        return self._emulated[case]

    def _run_plain(self, case: Case, sample: Sample) -> Run:
        model, device = self.engine.module, self.engine.device
        document_ids, query_ids = sample.document_ids.to(device), sample.query_ids.to(device)
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
        return Run(prefill_s, query_s, decode_s, prefill_peak, peak_memory_bytes(device))

    def _run_engine(self, sample: Sample) -> Run:
        engine, num_new = self.engine, self.bench.num_new_tokens
        document_ids, query_ids = sample.document_ids.to(engine.device), sample.query_ids.to(engine.device)
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
                query_ids=query_ids,
                context=context,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
            )
            query_s, decode_s = engine.stats.query_s, engine.stats.decode_s
        return Run(
            prefill_s=prefill_s,
            query_s=query_s,
            decode_s=decode_s,
            prefill_peak_bytes=prefill_peak,
            peak_bytes=peak_memory_bytes(engine.device),
            prefill_bytes_sent=context.bytes_sent,
            answer_bytes_sent=self.group.bytes_sent - sent_before,
            plan=context.plan,
        )
