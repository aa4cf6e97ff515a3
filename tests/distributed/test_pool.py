"""The pool of ranks that the other tests here rely on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed

from tests.models import build_model
from tests.pool import Pool, Pools, RankError, RankTimeout
from tests.tiny_checkpoint import save_checkpoint


def sum_over_ranks(rank: int, world_size: int, offset: int) -> tuple[int, float, torch.Tensor]:
    import deepspeed.comm

    assert deepspeed.comm.is_initialized()
    assert deepspeed.comm.get_world_size() == world_size
    value = torch.tensor([float(rank + offset)])
    deepspeed.comm.all_reduce(value)
    return rank, value.item(), torch.full((2,), rank)


def report_process(rank: int, world_size: int) -> tuple[int, int, str]:
    return os.getpid(), torch.get_num_threads(), os.environ["DS_ACCELERATOR"]


def raise_on_last_rank(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise ValueError("failure on the last rank")
    torch.distributed.barrier()


def raise_everywhere(rank: int, world_size: int) -> None:
    raise ValueError(f"rank {rank} of {world_size}")


def hang_on_first_rank(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)


@pytest.mark.parametrize("world_size", [2, 4])
def test_results_come_in_rank_order(pool: Pools, world_size: int) -> None:
    results = pool(world_size).run(sum_over_ranks, 10)
    total = sum(10 + rank for rank in range(world_size))
    assert [(rank, value) for rank, value, _ in results] == [(rank, total) for rank in range(world_size)]
    assert all(tensor.tolist() == [rank, rank] for rank, _, tensor in results)


def test_processes_are_reused_and_use_one_thread(pool: Pools) -> None:
    first, second = pool(2).run(report_process), pool(2).run(report_process)
    assert first == second
    assert {pid for pid, _, _ in first}.isdisjoint({os.getpid()})
    assert [(threads, accelerator) for _, threads, accelerator in first] == [(1, "cpu")] * 2


def test_an_error_reports_its_traceback_and_the_next_test_runs(pool: Pools) -> None:
    with pytest.raises(RankError, match="failure on the last rank") as caught:
        pool(2).run(raise_on_last_rank)
    assert "in raise_on_last_rank" in str(caught.value)
    assert pool(2).run(sum_over_ranks, 0)[0][1] == 1.0


def test_every_failing_rank_is_named(pool: Pools) -> None:
    with pytest.raises(RankError) as caught:
        pool(2).run(raise_everywhere)
    assert "rank 0 of 2" in str(caught.value) and "rank 1 of 2" in str(caught.value)


def test_a_hang_times_out_and_the_next_test_runs(pool: Pools) -> None:
    started = time.monotonic()
    with pytest.raises(RankTimeout, match=r"ranks \[0\] gave no answer") as caught:
        pool(2).run(hang_on_first_rank, timeout=1.0)
    assert time.monotonic() - started < 10
    assert "in hang_on_first_rank" in str(caught.value)
    assert pool(2).run(sum_over_ranks, 1)[1][1] == 3.0


def test_a_dead_process_is_an_error(pool: Pools) -> None:
    with pytest.raises(RankError, match="exit code 7"):
        pool(2).run(die)


def shards(rank: int, world_size: int, path: str) -> tuple[bool, bool]:
    """Whether an engine, and a session's, have sharded weights."""
    import apb_ds
    from apb_ds.loading import ModelConfig
    from apb_ds.parallel.groups import world_group
    from apb_ds.session.model_in_use import ModelInUse

    in_use = ModelInUse(ModelConfig(path=path, device="cpu"), group=world_group())
    engines = apb_ds.init_inference(build_model("llama")), in_use.engine(apb_ds.APBConfig(), world_group(), 60)
    return engines[0].weights is not None, engines[1].weights is not None


def test_engines_shard_their_weights_where_the_pool_is_told_to(tmp_path: Path) -> None:
    sharding = Pool(2, shard_weights=True)
    try:
        assert sharding.run(shards, str(save_checkpoint(tmp_path))) == [(True, True)] * 2
    finally:
        sharding.close()
