"""The sequence-parallel group: who is in it, and the few collectives that APB needs.

A collective whose peers are gone raises `LostRankError`, which names the rank that failed first.

This folder is the only place that imports ``deepspeed.comm``. A group of one rank imports nothing and sends nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apb_ds.ops import profiling
from apb_ds.parallel.failure.board import lost_ranks_named
from apb_ds.parallel.network import choose_gloo_interface
from apb_ds.parallel.pending import PendingGather, PendingShift

DEFAULT_TIMEOUT_S = 300
LOOPBACK = "127.0.0.1"


def _comm() -> Any:
    return importlib.import_module("deepspeed.comm")


@dataclass
class SequenceGroup:
    """Ranks that share one request. `process_group` is None for a group of one rank.

    Attributes
    ----------
    rank, world_size : this process's place in the group
    bytes_sent : payload bytes that this rank has sent to other ranks so far (an all-gather sends to each of them)
    """

    process_group: Any = None
    rank: int = 0
    world_size: int = 1
    bytes_sent: int = field(default=0, compare=False)

    @classmethod
    def of(cls, process_group: Any) -> SequenceGroup:
        """Wrap a torch process group."""
        deepspeed_comm_ready()
        comm = _comm()
        world_size = comm.get_world_size(group=process_group)
        if world_size == 1:
            return cls()
        return cls(process_group, comm.get_rank(group=process_group), world_size)

    @classmethod
    def from_mpu(cls, mpu: Any) -> SequenceGroup:
        """Take the sequence-parallel group of a Megatron-style object."""
        if not hasattr(mpu, "get_sequence_parallel_group"):
            raise ValueError(
                f"mpu={type(mpu).__name__} has no get_sequence_parallel_group(); pass a Megatron-style object such as "
                "deepspeed.runtime.sequence_parallel.parallel_state_sp, or leave mpu out to use all ranks."
            )
        return cls.of(mpu.get_sequence_parallel_group())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.world_size - 1

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_all_gather(self, tensor: Tensor) -> PendingGather:
        """Start gathering `tensor` (same shape and dtype on every rank); the caller keeps it unchanged until `wait`."""
        if self.world_size == 1:
            return PendingGather(tensor.unsqueeze(0))
        tensor = tensor.contiguous()
        # Gloo wants the ranks' parts along the first dimension; a view splits them apart again.
        joined = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
        with lost_ranks_named():
            work = _comm().all_gather_into_tensor(joined, tensor, group=self.process_group, async_op=True)
        self._count(tensor)
        return PendingGather(joined.view(self.world_size, *tensor.shape), work, tensor)

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_shift(self, tensor: Tensor) -> PendingShift:
        """Start sending `tensor` to the next rank and receiving one like it from the rank before, around the ring.

        The caller keeps it unchanged until `wait`.
        """
        if self.world_size == 1:
            return PendingShift(tensor)
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        peers = [self._global_rank(self.rank + step) for step in (1, -1)]
        operations = [
            torch.distributed.P2POp(torch.distributed.isend, tensor, peers[0], self.process_group),
            torch.distributed.P2POp(torch.distributed.irecv, received, peers[1], self.process_group),
        ]
        with lost_ranks_named():
            works = torch.distributed.batch_isend_irecv(operations)
        self.count_bytes(tensor.numel() * tensor.element_size())
        return PendingShift(received, works, tensor)

    def share_heads(self, attend: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return `attend` with DeepSpeed's all-to-all around it, from shares of the tokens to shares of the heads.

        Parameters
        ----------
        attend : callable
            Takes queries, keys and values, (1, tokens, heads / world_size, head_dim) each, with all ranks' tokens, and
            what else DeepSpeed hands over; returns the output, shaped as the queries.

        Returns
        -------
        callable that takes this rank's tokens, (1, tokens, heads, head_dim), as many on every rank, and returns their
        output
        """
        if self.world_size == 1:
            return attend
        layer = importlib.import_module("deepspeed.sequence.layer")
        distributed = layer.DistributedAttention(attend, self.process_group, scatter_idx=2, gather_idx=1)

        @profiling.belongs_to(profiling.COMMUNICATION)
        def exchange(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with lost_ranks_named():
                output: Tensor = distributed(query.contiguous(), key.contiguous(), value.contiguous(), 0)
            self._count_shared(query, key, value)
            return output

        return exchange

    def count_bytes(self, number: int) -> None:
        """Count payload bytes that this rank has sent by other means than this group's methods."""
        self.bytes_sent += number

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return ``(world_size, *tensor.shape)``, the ranks' tensors in rank order."""
        return self.start_all_gather(tensor).wait()

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with the first rank's, in place, and return it."""
        if self.world_size > 1:
            with lost_ranks_named():
                _comm().broadcast(tensor, src=self._global_rank(0), group=self.process_group)
            if self.is_first:
                self._count(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with lost_ranks_named():
            _comm().all_gather_object(values, value, group=self.process_group)
        return values

    def is_same(self, digest: bytes, device: torch.device | None = None) -> bool:
        """Return whether all ranks have the same digest (as long on every rank); the same answer on each of them.

        Parameters
        ----------
        device : where the backend's tensors must be; None where none is there yet, at the price of one more message
        """
        if self.world_size == 1:
            return True
        if device is None:
            return len(set(self.gather_objects(digest))) == 1
        mine = torch.tensor(list(digest), dtype=torch.uint8).to(device)
        everyone = mine.new_empty(self.world_size * len(digest))
        with lost_ranks_named():
            _comm().all_gather_into_tensor(everyone, mine, group=self.process_group)
        return bool((everyone.view(self.world_size, -1) == mine).all())

    def barrier(self) -> None:
        if self.world_size > 1:
            with lost_ranks_named():
                _comm().barrier(group=self.process_group)

    def set_timeout(self, timeout_s: float) -> None:
        """Bound each later collective of the group, whoever made it: after so many seconds it fails on this rank."""
        if self.world_size > 1:
            torch.distributed.distributed_c10d._set_pg_timeout(
                datetime.timedelta(seconds=timeout_s), self.process_group
            )

    def _global_rank(self, rank: int) -> int:
        return int(torch.distributed.get_global_rank(self.process_group, rank % self.world_size))

    def _count_shared(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Count four all-to-alls: of queries, keys, values and an output like the queries."""
        sent = sum(states.numel() * states.element_size() for states in (query, key, value, query))
        self.count_bytes(sent * (self.world_size - 1) // self.world_size)

    def _count(self, tensor: Tensor) -> None:
        self.bytes_sent += tensor.numel() * tensor.element_size() * (self.world_size - 1)


def launched_world_size() -> int:
    """Number of ranks that the launcher (deepspeed, torchrun) started, from its environment; 1 without a launcher."""
    started = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if started else 1


def launched_rank() -> int:
    """Global rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0")) if launched_world_size() > 1 else 0


def share_cpu_cores() -> None:
    """Give this process its share of the node's cores, so that the ranks of a node do not fight for all of them.

    Left alone where ``OMP_NUM_THREADS`` says how many threads to use; the 1 that torchrun sets unasked does not count.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    asked = os.environ.get("OMP_NUM_THREADS")
    unasked = asked is None or (asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ)
    if local_ranks > 1 and unasked:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_ranks))


def world_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> SequenceGroup:
    """Return the group of all ranks, joining them first if a launcher started several and nobody has.

    Parameters
    ----------
    timeout_s : float, seconds
        How long a collective may take before the process group gives up.
    """
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not initialized and launched_world_size() == 1:
        return SequenceGroup()
    share_cpu_cores()
    deepspeed_comm_ready(timeout_s)
    return SequenceGroup.of(torch.distributed.group.WORLD)


def training_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> SequenceGroup:
    """Return the group of all ranks, joined even where there is one alone: DeepSpeed trains within a group only.

    Parameters
    ----------
    timeout_s : float, seconds
        How long a collective may take before the process group gives up.
    """
    if launched_world_size() == 1 and not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
        os.environ.update(alone)
    deepspeed_comm_ready(timeout_s)
    share_cpu_cores()
    return SequenceGroup.of(torch.distributed.group.WORLD)


def deepspeed_comm_ready(timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Initialise ``deepspeed.comm``: over the process group that exists, else with the accelerator's backend."""
    deepspeed = importlib.import_module("deepspeed")
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    # Whoever initialised torch.distributed has chosen this rank's device already.
    if accelerator.device_name() != "cpu" and not torch.distributed.is_initialized():
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")) % accelerator.device_count())
    backend = accelerator.communication_backend_name()
    if backend == "gloo" and not torch.distributed.is_initialized():
        choose_gloo_interface()
    # What is sent goes before what is computed meanwhile, or it would begin when that is done.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    with _no_shared_memory_op():
        deepspeed.init_distributed(
            dist_backend=backend,
            timeout=datetime.timedelta(seconds=timeout_s),
            dist_init_required=None,
            verbose=False,
        )


@contextlib.contextmanager
def _no_shared_memory_op() -> Iterator[None]:
    """Have DeepSpeed's communication start without its shared-memory op, which none of our collectives uses.

    DeepSpeed compiles it at the first start on CPU, which takes a minute. A rank that is killed meanwhile leaves a lock
    in torch's extensions directory, on which every later start waits for ever.
    """
    ops: Any = importlib.import_module("deepspeed.ops")
    name = "__compatible_ops__"  # found out when first asked for; nothing in it counts as not compatible
    before = ops.__dict__.get(name)
    ops.__dict__[name] = {}
    try:
        yield
    finally:
        del ops.__dict__[name]
        if before is not None:
            ops.__dict__[name] = before
