"""Collectives between real processes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed
from torch import Tensor

from tests.pool import Pool, Pools, RankError

SHAPES: list[tuple[int, ...]] = [(5,), (2, 3), (2, 1, 4, 3, 8), (1, 1), (3, 0, 2)]


def everyones_tensors(shape: tuple[int, ...], world_size: int, dtype: torch.dtype) -> list[Tensor]:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return [(numbers % 31 + 32 * rank).to(dtype) for rank in range(world_size)]


def gather_all(rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    """Gather every shape and dtype; return each result with the bytes that this rank sent for it."""
    from apb_ds.parallel.groups import world_group

    group = world_group()
    assert (group.rank, group.world_size) == (rank, world_size)
    assert (group.is_first, group.is_last) == (rank == 0, rank == world_size - 1)
    gathered = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            before = group.bytes_sent
            mine = everyones_tensors(shape, world_size, dtype)[rank]
            gathered.append((group.all_gather(mine), group.bytes_sent - before))
    return gathered


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_gather_keeps_order_and_shape(pool: Pools, world_size: int) -> None:
    for results in pool(world_size).run(gather_all):
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                gathered, sent = results.pop(0)
                expected = torch.stack(everyones_tensors(shape, world_size, dtype))
                assert gathered.shape == (world_size, *shape) and gathered.dtype == dtype
                assert torch.equal(gathered, expected)
                assert sent == expected[0].numel() * dtype.itemsize * (world_size - 1)


def gather_in_flight(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Two gathers in flight, of non-contiguous tensors, waited for in reverse order."""
    from apb_ds.parallel.groups import world_group

    group = world_group()
    first = group.start_all_gather((torch.arange(6.0).reshape(2, 3) + 10 * rank).T)
    second = group.start_all_gather(torch.full((2, 2), float(rank)))
    later = second.wait()
    assert second.wait() is later, "waiting again is harmless"
    return first.wait(), later


def test_gathers_may_overlap(pool: Pools) -> None:
    for first, second in pool(2).run(gather_in_flight):
        assert torch.equal(first, torch.stack([(torch.arange(6.0).reshape(2, 3) + 10 * rank).T for rank in range(2)]))
        assert torch.equal(second, torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]))


def broadcast_and_objects(rank: int, world_size: int) -> tuple[list[int], bool, int, list[Any]]:
    from apb_ds.parallel.groups import world_group

    group = world_group()
    tensor = torch.full((3,), 7 + rank)
    before = group.bytes_sent
    same = group.broadcast(tensor) is tensor
    sent = group.bytes_sent - before
    group.barrier()
    return tensor.tolist(), same, sent, group.gather_objects({"rank": rank} if rank else None)


@pytest.mark.parametrize("world_size", [2, 4])
def test_broadcast_and_objects(pool: Pools, world_size: int) -> None:
    objects = [None, *({"rank": rank} for rank in range(1, world_size))]
    for rank, (tensor, same, sent, gathered) in enumerate(pool(world_size).run(broadcast_and_objects)):
        assert tensor == [7, 7, 7] and same
        assert sent == (3 * 8 * (world_size - 1) if rank == 0 else 0), "only the first rank sends"
        assert gathered == objects


class PairsMpu:
    """A Megatron-style object whose sequence-parallel groups are pairs of neighbours."""

    def __init__(self, rank: int, world_size: int) -> None:
        pairs = [torch.distributed.new_group([first, first + 1]) for first in range(0, world_size, 2)]
        self.group = pairs[rank // 2]

    def get_sequence_parallel_group(self) -> Any:
        return self.group


def gather_in_pairs(rank: int, world_size: int) -> tuple[int, int, list[int], list[int]]:
    from apb_ds.parallel.groups import SequenceGroup

    group = SequenceGroup.from_mpu(PairsMpu(rank, world_size))
    first = group.broadcast(torch.tensor([rank]))
    return group.rank, group.world_size, group.all_gather(torch.tensor([rank])).flatten().tolist(), first.tolist()


def test_the_group_of_an_mpu(pool: Pools) -> None:
    """Group ranks are not global ranks: the second pair's first rank is global rank 2."""
    expected = [(0, 2, [0, 1], [0]), (1, 2, [0, 1], [0]), (0, 2, [2, 3], [2]), (1, 2, [2, 3], [2])]
    assert pool(4).run(gather_in_pairs) == expected


def gather_in_parts(rank: int, world_size: int) -> list[Any]:
    from apb_ds.parallel.groups import world_group

    group = world_group()
    assert group.part(None) is group and group.part(world_size) is group
    found: list[Any] = []
    for num_ranks in (1, 2):
        part = group.part(num_ranks)
        assert group.part(num_ranks) is part
        for parts in (part, part.apart()):
            before = group.bytes_sent
            gathered = parts.all_gather(torch.tensor([rank])).flatten().tolist()
            assert (parts.rank, parts.world_size) == (rank % num_ranks, num_ranks)
            found.append((gathered, group.bytes_sent - before))
    assert group.part(2).board is group.board and group.part(2).progress is group.progress
    timeouts = []
    for timeout_s in (250, 300):
        group.set_timeout(timeout_s)
        made = group.part(2), group.part(2).apart(), group.apart()
        timeouts.append([one._timeout().total_seconds() for one in made])
    return [*found, timeouts]


def test_parts_of_a_group(pool: Pools) -> None:
    for rank, (*found, timeouts) in enumerate(pool(4).run(gather_in_parts)):
        pair = [rank - rank % 2, rank - rank % 2 + 1]
        assert found == [([rank], 0), ([rank], 0), (pair, 8), (pair, 8)]
        assert timeouts == [[250] * 3, [300] * 3]


def group_of_one(rank: int, world_size: int) -> tuple[int, int, int]:
    from apb_ds.parallel.groups import SequenceGroup

    alone = [torch.distributed.new_group([member]) for member in range(world_size)]
    group = SequenceGroup.of(alone[rank])
    group.all_gather(torch.zeros(4))
    return group.rank, group.world_size, group.bytes_sent


def test_a_process_group_of_one_rank_sends_nothing(pool: Pools) -> None:
    assert pool(2).run(group_of_one) == [(0, 1, 0)] * 2


def bad_mpu(rank: int, world_size: int) -> None:
    from apb_ds.parallel.groups import SequenceGroup

    SequenceGroup.from_mpu(object())


def test_every_rank_refuses_a_bad_mpu(pool: Pools) -> None:
    with pytest.raises(RankError, match="get_sequence_parallel_group") as caught:
        pool(2).run(bad_mpu)
    assert "rank 0" in str(caught.value) and "rank 1" in str(caught.value)


def settings_that_do_not_divide(rank: int, world_size: int) -> str:
    import apb_ds
    from tests.models import build_model

    try:
        apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(hosts=3))
    except ValueError as error:
        return str(error)
    return "no error"


def test_every_rank_refuses_hosts_that_do_not_divide(pool: Pools) -> None:
    messages = pool(2).run(settings_that_do_not_divide)
    assert messages[0] == messages[1] and "hosts=3" in messages[0] and "use hosts=4" in messages[0]


def start_communication(rank: int, world_size: int) -> list[Any]:
    """Start deepspeed.comm again, recording which ops it compiles; then run into a timeout."""
    import deepspeed.comm.comm as comm
    import deepspeed.ops as ops
    from deepspeed.ops.op_builder.cpu import comm as builders

    from apb_ds.parallel.groups import deepspeed_comm_ready, world_group

    compiled: list[str] = []
    before = ops.__dict__.get("__compatible_ops__")
    with (
        mock.patch.object(comm, "cdb", None),
        mock.patch.object(builders.ShareMemCommBuilder, "load", lambda self: compiled.append(self.NAME)),
    ):
        deepspeed_comm_ready()
        assert comm.cdb is not None
    assert ops.__dict__.get("__compatible_ops__") is before, "DeepSpeed's own state is restored"
    group = world_group()
    group.set_timeout(1)
    error = ""
    if rank == 0:
        try:
            group.all_gather(torch.zeros(3))
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    return [compiled, error]


def test_no_shared_memory_op_is_compiled_and_a_timeout_holds() -> None:
    """Needs a fresh pool: a group is unusable after a failed collective."""
    fresh = Pool(2)
    try:
        first, second = fresh.run(start_communication, timeout=30)
    finally:
        fresh.close()
    assert first[0] == second[0] == []
    assert first[1].startswith("LostRankError: rank 0 cannot continue in ") and "Timed out waiting 1000ms" in first[1]
