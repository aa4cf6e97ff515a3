"""The ranks of a request as a pipeline of stages, on DeepSpeed's topology and with its point-to-point messages."""

from __future__ import annotations

import importlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apb_ds.config import check_integer
from apb_ds.ops import profiling
from apb_ds.parallel.failure.board import lost_ranks_named
from apb_ds.parallel.groups import SequenceGroup

# What a rank has sent and the next stage has not yet taken: as in DeepSpeed's schedules, so many at most.
MAX_UNDER_WAY = 2


def _comm() -> Any:
    return importlib.import_module("deepspeed.comm")


_pipelines: dict[tuple[Any, int], Pipeline] = {}  # by process group and number of stages


class Channel:
    """Messages from each rank to its peer in the next stage, in order.

    Parameters
    ----------
    from_before, to_after : all ranks, as two groups, so that receiving does not hold up sending
    before, after : global ranks of the peers in the stages before and after; None where there is none

    Attributes
    ----------
    bytes_sent : to the next stage
    """

    def __init__(
        self, from_before: SequenceGroup, to_after: SequenceGroup, before: int | None, after: int | None
    ) -> None:
        self._from_before, self._to_after = from_before, to_after
        self._before, self._after = before, after
        self._under_way: deque[tuple[Tensor, Any]] = deque()  # tensors stay alive until they have arrived
        self.bytes_sent = 0

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_receiving(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> PendingReceive:
        """Start to receive a tensor from the stage before."""
        received = torch.empty(shape, dtype=dtype, device=device)
        with lost_ranks_named(self._from_before.board):
            work = _comm().irecv(received, self._before, group=self._from_before.process_group)
        return PendingReceive(received, work, self._from_before)

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_sending(self, tensor: Tensor) -> None:
        """Start to send a tensor, which must not change any more, to the next stage.

        Waits until that has taken all but the last `MAX_UNDER_WAY` - 1 before it.
        """
        self.finish_sending(MAX_UNDER_WAY - 1)
        tensor = tensor.contiguous()
        with lost_ranks_named(self._to_after.board):
            self._under_way.append((tensor, _comm().isend(tensor, self._after, group=self._to_after.process_group)))
        self.bytes_sent += tensor.nbytes
        self._to_after.count_bytes(tensor.nbytes)

    def finish_sending(self, left: int = 0) -> None:
        """Wait until no more than `left` tensors are on their way."""
        with lost_ranks_named(self._to_after.board):
            while len(self._under_way) > left:
                self._under_way.popleft()[1].wait()


class Pipeline:
    """Stages that follow each other, each a sequence-parallel group of as many ranks.

    Rank r of a stage sends to rank r of the next one. The ranks are those of DeepSpeed's `PipeDataParallelTopology`:
    its axis ``pipe`` numbers the stages, and its axis ``data`` the ranks of a stage, which follow each other.

    All ranks of the group make it together.

    Parameters
    ----------
    group : all ranks
    num_stages : a divisor of their number

    Attributes
    ----------
    group, num_stages : as given
    topology : DeepSpeed's
    ranks : of this stage
    stage : this rank's, from 0
    rounds, tokens : channels for a prefill's rounds, and for forwards of new tokens, which may come between these
    """

    def __init__(self, group: SequenceGroup, num_stages: int) -> None:
        check_stages(num_stages, group.world_size)
        topology = importlib.import_module("deepspeed.runtime.pipe.topology")
        self.group = group
        self.num_stages = num_stages
        self.topology = topology.PipeDataParallelTopology(num_pp=num_stages, num_dp=group.world_size // num_stages)
        self.stage = int(self.topology.get_coord(group.rank).pipe)
        self.ranks = group.part(group.world_size // num_stages)
        self.rounds, self.tokens = self._channel(), self._channel()

    @classmethod
    def of(cls, group: SequenceGroup, num_stages: int) -> Pipeline:
        """Return the group's ranks as a pipeline, the same for each call with as many stages."""
        key = group.process_group, num_stages
        if key not in _pipelines:
            _pipelines[key] = cls(group, num_stages)
        return _pipelines[key]

    def _channel(self) -> Channel:
        # What a stage in the middle sends goes in another group than what it receives, and waits for.
        links = [self.group.apart() for _ in range(min(2, self.num_stages - 1))]
        before, after = (links[(self.stage + step) % len(links)] for step in (1, 0))
        return Channel(before, after, self._peer(-1), self._peer(1))

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def bytes_between_stages(self) -> int:
        """Bytes of hidden states that this rank has sent to the next stage so far."""
        return self.rounds.bytes_sent + self.tokens.bytes_sent

    @profiling.belongs_to(profiling.COMMUNICATION)
    def bring_back(self, tensor: Tensor) -> Tensor:
        """Send a tensor from the first rank of the last stage to the first of all ranks, which returns it.

        Parameters
        ----------
        tensor : on the first rank of the last stage what is sent, elsewhere one like it
        """
        with lost_ranks_named(self.group.board):
            if self.is_last and self.ranks.is_first:
                _comm().send(tensor.contiguous(), self._global_rank(stage=0), group=self.group.process_group)
                self.group.count_bytes(tensor.nbytes)
            elif self.group.is_first:
                source = self._global_rank(stage=self.num_stages - 1)
                _comm().recv(tensor, source, group=self.group.process_group)
        return tensor

    def _peer(self, step: int) -> int | None:
        """Return the global rank of this rank's peer in the stage before or after, None without such a stage."""
        stage = self.stage + step
        rank = int(self.topology.get_coord(self.group.rank).data)
        return self._global_rank(stage, rank) if 0 <= stage < self.num_stages else None

    def _global_rank(self, stage: int, rank: int = 0) -> int:
        in_group = self.topology.get_rank(pipe=stage, data=rank)
        return int(torch.distributed.get_global_rank(self.group.process_group, in_group))


@dataclass
class PendingReceive:
    """A tensor that is about to arrive; `wait` returns it."""

    received: Tensor
    work: Any
    group: SequenceGroup

    @profiling.belongs_to(profiling.COMMUNICATION)
    def wait(self) -> Tensor:
        with lost_ranks_named(self.group.board):
            self.work.wait()
        return self.received


def check_stages(stages: int, world_size: int, name: str = "stages") -> None:
    """Raise ValueError, calling it `name`, unless so many ranks can be a pipeline of so many stages."""
    check_integer(name, stages, 1)
    if world_size % stages:
        raise ValueError(f"{name}={stages} must be a divisor of the number of ranks ({world_size}).")
