"""A benchmark from its config to its record: cases take turns, each repeat has a new document."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from apb_ds.bench.cases import Case, make_cases
from apb_ds.bench.config import BenchConfig
from apb_ds.bench.measure import CaseResult, Runner
from apb_ds.bench.record import make_record
from apb_ds.bench.sequences import random_queries
from apb_ds.compressors.base import needs_heads
from apb_ds.config import APBConfig, from_mapping
from apb_ds.engine.api import init_inference
from apb_ds.hf.architecture import check_positions
from apb_ds.loading import LoadedModel, load_model
from apb_ds.loading.heads import heads_for
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.parallel.emulated import EmulatedGroup
from apb_ds.parallel.failure.ending import Watch
from apb_ds.parallel.groups import SequenceGroup, world_group
from apb_ds.session import Settings, read_settings
from apb_ds.tasks import Sample
from apb_ds.tasks.base import random_sample

Keep = Callable[[dict[str, Any]], None]


def run_bench(
    values: dict[str, Any], keep: Keep | None = None, watch: Watch | None = None
) -> tuple[dict[str, Any], SequenceGroup]:
    """Measure what a composed config asks for, all ranks together.

    Parameters
    ----------
    keep : called on the group's first rank after each run with the record so far, so that an interrupted benchmark
        loses only its current run
    watch : the process's, which follows the group

    Returns
    -------
    dict
        The record, the same on every rank but for the hardware; see `apb_ds.bench.record`.
    SequenceGroup
        The ranks that took part.

    Raises
    ------
    ValueError, RuntimeError
        For settings that cannot be measured, before anything is.
    """
    values = dict(values)
    bench = from_mapping(BenchConfig, values.pop("bench", None) or {}, "bench")
    settings = read_settings(values, bench.emulate_ranks)
    if settings.stages > 1:
        raise ValueError(
            f"parallel.stages={settings.stages}: launch/bench.py measures whole models; use benchmarks/stages.py."
        )
    lengths = bench.lengths or _task_lengths(settings)
    group = world_group(settings.timeout_s, watch)
    shards = settings.model.shard_weights is True  # auto shards nothing for a real rank alone
    cases = make_cases(bench, settings.method_for(1), lengths, group.world_size, shards=shards)
    # Emulated ranks all compute with the first one's part of the weights.
    holders = EmulatedGroup(world_size=bench.emulate_ranks, copies=True) if shards and bench.emulate_ranks else group
    loaded = load_model(settings.model, group=holders.part(settings.shard_ranks))
    runner = _make_runner(bench, settings, loaded, group, holders, cases)
    results = []
    for case in cases:
        results.append(CaseResult(case, runner.set_up(case)))  # refuses what cannot be served
        check_positions(loaded.model, bench.num_positions(case.length))
    runner.forget()

    def keep_so_far() -> None:
        measured = [result for result in results if result.is_measured]
        if keep is not None and group.is_first and measured:
            keep(make_record(values, bench, settings, loaded, measured, is_complete=False))

    for length in lengths:
        of_length = [result for result in results if result.case.length == length]
        _measure_length(runner, of_length, settings.seed, keep_so_far)
        runner.forget()
    return make_record(values, bench, settings, loaded, results), group


def _task_lengths(settings: Settings) -> tuple[int, ...]:
    """Return the length of the task's document."""
    length = getattr(settings.task, "num_tokens", None)
    lengths = tuple(length) if isinstance(length, (list, tuple)) else (length,)
    if not all(isinstance(number, int) for number in lengths):
        raise ValueError(f"bench.lengths is missing, and task={settings.task.name} has no num_tokens; give lengths.")
    return lengths


def _make_runner(
    bench: BenchConfig,
    settings: Settings,
    loaded: LoadedModel,
    group: SequenceGroup,
    holders: SequenceGroup,
    cases: Sequence[Case],
) -> Runner:
    configs = [case.config for case in cases if case.config is not None and not case.emulated]
    config = configs[0] if configs else APBConfig(hosts=holders.world_size)
    with_heads = [case.config for case in cases if case.config and needs_heads(case.config.compressor)]
    heads = heads_for(loaded.model, with_heads[0], settings.retaining_heads) if with_heads else None
    given = heads if needs_heads(config.compressor) else None
    shards = loaded.shard_weights
    engine = init_inference(
        loaded.model,
        config,
        group=holders,
        retaining_heads=given,
        shard_weights=shards,
        shard_ranks=settings.shard_ranks if shards else None,
    )
    return Runner(engine, group, bench, heads)


def _measure_length(runner: Runner, results: Sequence[CaseResult], seed: int, keep_so_far: Callable[[], None]) -> None:
    """Run the cases of one length in turns."""
    bench = runner.bench
    vocab_size = runner.engine.module.get_input_embeddings().num_embeddings
    length = results[0].case.length
    for repeat in range(-bench.warmup, bench.repeats):
        for result in results:
            sample = make_sample(bench, length, vocab_size, seed, repeat)
            _attempt(result, runner.group, partial(runner.run, result, sample, is_timed=repeat >= 0))
            if repeat >= 0:
                keep_so_far()
    if bench.sequences:
        sample, other = (make_sample(bench, length, vocab_size, seed, bench.repeats + more) for more in (0, 1))
        queries = random_queries(max(bench.sequences), bench.query_tokens, vocab_size, seed)
        for result in results:
            if result.case.config is not None:
                _attempt(result, runner.group, partial(runner.ask_many, result, sample, queries, other))
                keep_so_far()
    if bench.breakdown:
        sample = make_sample(bench, length, vocab_size, seed, bench.repeats)
        for result in results:
            _attempt(result, runner.group, partial(runner.break_down, result, sample))


def make_sample(bench: BenchConfig, length: int, vocab_size: int, seed: int, repeat: int) -> Sample:
    """Return a repeat's document of random ids: new in each repeat, the same for every case and in every benchmark."""
    drawn = random.Random(f"{seed}/{length}/{repeat}").getrandbits(32)
    return random_sample(length, bench.query_tokens, vocab_size, drawn, bench.num_new_tokens)


def _attempt(result: CaseResult, group: SequenceGroup, work: Callable[[], None]) -> None:
    """Do the work unless the case has failed. On a single rank, running out of memory ends the case alone."""
    if result.error is not None:
        return
    try:
        work()
        return
    except (RuntimeError, MemoryError) as error:
        if group.world_size > 1 or not is_out_of_memory(error):
            raise  # other ranks are in a collective: the launcher ends them
        result.error = f"out of memory: {error}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
