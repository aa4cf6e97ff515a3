"""A benchmark from its config to its record: cases in turns, a fresh document for every repeat."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from apb_ds.bench.cases import Case, make_cases
from apb_ds.bench.config import BenchConfig
from apb_ds.bench.emulate import slowest_rank
from apb_ds.bench.measure import Runner, Runs
from apb_ds.bench.record import make_record
from apb_ds.compressors.base import needs_heads
from apb_ds.config import APBConfig, from_mapping
from apb_ds.engine.api import init_inference
from apb_ds.hf.architecture import check_positions
from apb_ds.loading import LoadedModel, load_model
from apb_ds.loading.heads import heads_for
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.parallel.groups import SequenceGroup, world_group
from apb_ds.session import Settings, read_settings
from apb_ds.tasks import Sample
from apb_ds.tasks.base import random_sample

Result = TypeVar("Result")


Keep = Callable[[dict[str, Any]], None]


def run_bench(values: dict[str, Any], keep: Keep | None = None) -> tuple[dict[str, Any], SequenceGroup]:
    """Measure what a composed config asks for, all ranks together.

    Parameters
    ----------
    keep : called on the group's first rank after each run with the record of what has been measured so far, so that
        a benchmark that is stopped loses no more than what it was at

    Returns
    -------
    dict
        The record, the same on every rank but for the machine; see `apb_ds.bench.record`.
    SequenceGroup
        The ranks that took part.

    Raises
    ------
    ValueError, RuntimeError
        For settings that cannot be measured, before anything is.
    """
    values = dict(values)
    bench = from_mapping(BenchConfig, values.pop("bench", None) or {}, "bench")
    settings = read_settings(values)
    lengths = bench.lengths or _task_lengths(settings)
    group = world_group(settings.timeout_s)
    cases = make_cases(bench, settings.method_for(1), lengths, group.world_size)
    loaded = load_model(settings.model)
    runner = _make_runner(bench, settings, loaded, group, cases)
    all_runs = []
    for case in cases:
        runner.set_up(case)  # what cannot be served is refused before anything is measured
        check_positions(loaded.model, case.length + bench.query_tokens + bench.num_new_tokens)
        all_runs.append(Runs(case, runner.kernels(case)))
    runner.forget()

    def keep_so_far() -> None:
        measured = [runs for runs in all_runs if runs.is_measured]
        if keep is not None and group.is_first and measured:
            keep(make_record(values, bench, settings, loaded, measured, is_complete=False))

    for length in lengths:
        of_length = [runs for runs in all_runs if runs.case.length == length]
        _measure_length(runner, of_length, loaded, settings.seed, keep_so_far)
        runner.forget()
    return make_record(values, bench, settings, loaded, all_runs), group


def _task_lengths(settings: Settings) -> tuple[int, ...]:
    """Return the length of the task's document."""
    length = getattr(settings.task, "num_tokens", None)
    lengths = tuple(length) if isinstance(length, (list, tuple)) else (length,)
    if not all(isinstance(number, int) for number in lengths):
        raise ValueError(f"bench.lengths is missing, and task={settings.task.name} has no num_tokens; give lengths.")
    return lengths


def _make_runner(
    bench: BenchConfig, settings: Settings, loaded: LoadedModel, group: SequenceGroup, cases: Sequence[Case]
) -> Runner:
    configs = [case.config for case in cases if case.config is not None and not case.emulated]
    config = configs[0] if configs else APBConfig(hosts=group.world_size)
    with_heads = [case.config for case in cases if case.config and needs_heads(case.config.compressor)]
    heads = heads_for(loaded.model, with_heads[0], settings.retaining_heads) if with_heads else None
    given = heads if needs_heads(config.compressor) else None
    return Runner(init_inference(loaded.model, config, group=group, retaining_heads=given), group, bench, heads)


def _measure_length(
    runner: Runner, all_runs: Sequence[Runs], loaded: LoadedModel, seed: int, keep_so_far: Callable[[], None]
) -> None:
    """Run the cases of one length in turns."""
    bench, group = runner.bench, runner.group
    vocab_size = loaded.model.get_input_embeddings().num_embeddings
    for repeat in range(-bench.warmup, bench.repeats):
        for runs in all_runs:
            sample = make_sample(bench, runs.case.length, vocab_size, seed, repeat)
            _attempt(runs, group, partial(_run_once, runner, runs, sample, is_timed=repeat >= 0))
            if repeat >= 0:
                keep_so_far()
    if not bench.breakdown:
        return
    sample = make_sample(bench, all_runs[0].case.length, vocab_size, seed, bench.repeats)
    for runs in all_runs:
        rank = slowest_rank(runs.emulated) if runs.emulated else 0
        parts = _attempt(runs, group, partial(runner.break_down, runs.case, sample, rank))
        runs.breakdown = parts or []


def make_sample(bench: BenchConfig, length: int, vocab_size: int, seed: int, repeat: int) -> Sample:
    """Return the document of a repeat, of random ids: another one in each, the same for every case and in every run."""
    drawn = random.Random(f"{seed}/{length}/{repeat}").getrandbits(32)
    return random_sample(length, bench.query_tokens, vocab_size, drawn, bench.num_new_tokens)


def _run_once(runner: Runner, runs: Runs, sample: Sample, is_timed: bool) -> None:
    allocated = runner.allocated_bytes()
    if runs.case.emulated:
        ranks = runner.run_emulated(runs.case, sample)
        if is_timed:
            runs.emulated.append(ranks)
    else:
        measured = runner.run(runs.case, sample)
        if is_timed:
            runs.ranks.append(measured)
    if is_timed:
        runs.clocks.append(runner.clocks())
        runs.allocated_before_bytes = allocated


def _attempt(runs: Runs, group: SequenceGroup, work: Callable[[], Result]) -> Result | None:
    """Do the work, unless the case has failed; on one rank, a case that runs out of memory is left out from then on."""
    if runs.error is not None:
        return None
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if group.world_size > 1 or not is_out_of_memory(error):
            raise  # of several ranks, the others are in a collective: the launcher ends them
        runs.error = f"out of memory: {error}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
