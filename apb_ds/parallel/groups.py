"""The sequence-parallel group: its ranks, and the few collectives that APB needs.

A collective whose peers are gone raises `LostRankError`, which names the rank that failed first.

Only this folder imports ``deepspeed.comm``. A group of one rank does not, and sends nothing.
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
from apb_ds.parallel.failure.board import Board, lost_ranks_named
from apb_ds.parallel.failure.ending import Watch
from apb_ds.parallel.failure.progress import Progress
from apb_ds.parallel.launcher import launched_world_size, ranks_on_node
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
    rank : this process's rank within the group
    bytes_sent : payload bytes that this rank has sent to other ranks so far (an all-gather sends to each of them), also
        through groups made from this one by `apart` and `part`
    progress : how far this rank has got, for failure reports
    """

    process_group: Any = None
    rank: int = 0
    world_size: int = 1
    bytes_sent: int = field(default=0, compare=False)
    progress: Progress = field(default_factory=Progress, compare=False, repr=False)
    _board: Board | None = field(default=None, compare=False, repr=False)
    _made_from: SequenceGroup | None = field(default=None, compare=False, repr=False)
    _made_with: list[list[int]] = field(default_factory=list, compare=False, repr=False)  # global ranks of all parts
    _made: list[SequenceGroup] = field(default_factory=list, compare=False, repr=False)
    _parts: dict[int, SequenceGroup] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, process_group: Any) -> SequenceGroup:
        """Wrap a torch process group."""
        deepspeed_comm_ready()
        comm = _comm()
        world_size = comm.get_world_size(group=process_group)
        if world_size == 1:
            return cls()
        group = cls(process_group, comm.get_rank(group=process_group), world_size)
        group._board = Board.of_world(group.progress)
        return group

    @classmethod
    def from_mpu(cls, mpu: Any) -> SequenceGroup:
        """Take the sequence-parallel group of a Megatron-style object."""
        if not hasattr(mpu, "get_sequence_parallel_group"):
            raise ValueError(
                f"mpu={type(mpu).__name__} has no get_sequence_parallel_group(); pass a Megatron-style object such as "
                "deepspeed.runtime.sequence_parallel.parallel_state_sp, or leave mpu out to use all ranks."
            )
        return cls.of(mpu.get_sequence_parallel_group())

    def on_cpu(self, timeout_s: float) -> SequenceGroup:
        """Return these ranks as a group whose messages need no accelerator; all of them call this together.

        Parameters
        ----------
        timeout_s : after which its collectives fail
        """
        if self.world_size == 1:
            return self
        choose_gloo_interface()
        timeout = datetime.timedelta(seconds=timeout_s)
        made = self._new_process_group([self._members()], timeout=timeout, backend="gloo")
        return SequenceGroup(made, self.rank, self.world_size, progress=self.progress, _board=self._board)

    def apart(self) -> SequenceGroup:
        """Return these ranks as another group, whose messages and this one's do not wait for each other.

        All of them call this together. What it sends counts here, too.
        """
        return SequenceGroup() if self.world_size == 1 else self._new_group(self._made_with or [self._members()])

    def part(self, num_ranks: int | None) -> SequenceGroup:
        """Return the part of this group that this rank belongs to: each has `num_ranks` ranks that follow each other.

        All ranks of the group call this together. The same part is returned each time.

        Parameters
        ----------
        num_ranks : a divisor of `world_size`; None for all ranks, which are this group
        """
        if num_ranks is None or num_ranks == self.world_size:
            return self
        if num_ranks not in self._parts:
            members = self._members()
            parts = [members[first : first + num_ranks] for first in range(0, self.world_size, num_ranks)]
            self._parts[num_ranks] = self._new_group(parts)
        return self._parts[num_ranks]

    def _new_group(self, parts: list[list[int]]) -> SequenceGroup:
        """Return the part that this rank is in, as a group with its own messages.

        Parameters
        ----------
        parts : global ranks of each, no rank in two of them; their ranks call this together
        """
        me = self._members()[self.rank]
        mine = next(ranks for ranks in parts if me in ranks)
        if len(mine) == 1:
            return SequenceGroup(progress=self.progress)
        made = SequenceGroup(
            self._new_process_group(parts, timeout=self._timeout()),
            mine.index(me),
            len(mine),
            progress=self.progress,
            _board=self._board,
            _made_from=self,
            _made_with=parts,
        )
        self._made.append(made)
        return made

    def _new_process_group(self, parts: list[list[int]], **options: Any) -> Any:
        """Return a new process group of the part that this rank is in; `parts` as of `_new_group`."""
        me = self._members()[self.rank]
        if sum(map(len, parts)) < torch.distributed.get_world_size():  # the others call nothing, or have other parts
            mine = next(ranks for ranks in parts if me in ranks)
            return torch.distributed.new_group(mine, use_local_synchronization=True, **options)
        made = [torch.distributed.new_group(ranks, **options) for ranks in parts]
        return next(group for group, ranks in zip(made, parts, strict=True) if me in ranks)

    def _members(self) -> list[int]:
        """Return the global ranks of this group."""
        return torch.distributed.get_process_group_ranks(self.process_group)

    def _timeout(self) -> datetime.timedelta:
        """Return after what time this group's collectives fail."""
        device = self.process_group._device_types[0]
        timeout: datetime.timedelta = self.process_group._get_backend(device).options._timeout
        return timeout

    @property
    def board(self) -> Board | None:
        """Where all ranks report failures; None for a rank alone, and once ``torch.distributed`` has been shut down."""
        return self._board if torch.distributed.is_initialized() else None

    @property
    def all_ranks(self) -> SequenceGroup:
        """The group that this one is a part of, else itself."""
        return self if self._made_from is None else self._made_from.all_ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.world_size - 1

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_all_gather(self, tensor: Tensor, into: Tensor | None = None) -> PendingGather:
        """Start gathering `tensor` (same shape and dtype on every rank). It must not change until `wait`.

        Parameters
        ----------
        into : (world_size * tensor.shape[0], ...), contiguous, where it is gathered; by default a new tensor. A group
            of one rank does not use it.
        """
        if self.world_size == 1:
            return PendingGather(tensor.unsqueeze(0))
        tensor = tensor.contiguous()
        # Gloo joins the ranks' parts along the first dimension; a view separates them.
        joined = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:])) if into is None else into
        with lost_ranks_named(self.board):
            work = _comm().all_gather_into_tensor(joined, tensor, group=self.process_group, async_op=True)
        self._count(tensor)
        return PendingGather(joined.view(self.world_size, *tensor.shape), work, tensor, self.board)

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_shift(self, tensor: Tensor) -> PendingShift:
        """Start sending `tensor` to the next rank of the ring and receiving one like it from the previous rank.

        It must not change until `wait`.
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
        with lost_ranks_named(self.board):
            works = torch.distributed.batch_isend_irecv(operations)
        self.count_bytes(tensor.numel() * tensor.element_size())
        return PendingShift(received, works, tensor, self.board)

    def share_heads(self, attend: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Wrap `attend` in DeepSpeed's all-to-alls: from a share of the tokens to a share of the heads, and back.

        Parameters
        ----------
        attend : callable
            Takes queries, keys and values of all ranks' tokens, (1, tokens, heads / world_size, head_dim) each, and
            DeepSpeed's further arguments; returns the output, shaped like the queries.

        Returns
        -------
        callable
            Takes this rank's tokens, (1, tokens, heads, head_dim), equally many on every rank; returns their output.
        """
        if self.world_size == 1:
            return attend
        layer = importlib.import_module("deepspeed.sequence.layer")
        distributed = layer.DistributedAttention(attend, self.process_group, scatter_idx=2, gather_idx=1)

        @profiling.belongs_to(profiling.COMMUNICATION)
        def exchange(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with lost_ranks_named(self.board):
                output: Tensor = distributed(query.contiguous(), key.contiguous(), value.contiguous(), 0)
            self._count_shared(query, key, value)
            return output

        return exchange

    def count_bytes(self, number: int) -> None:
        """Count payload bytes that this rank has sent without this group's methods."""
        self.bytes_sent += number
        if self._made_from is not None:
            self._made_from.count_bytes(number)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return ``(world_size, *tensor.shape)``, the ranks' tensors in rank order."""
        return self.start_all_gather(tensor).wait()

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` in place with the first rank's, and return it."""
        if self.world_size > 1:
            with lost_ranks_named(self.board):
                _comm().broadcast(tensor, src=self._global_rank(0), group=self.process_group)
            if self.is_first:
                self._count(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with lost_ranks_named(self.board):
            _comm().all_gather_object(values, value, group=self.process_group)
        return values

    def is_same(self, digest: bytes, device: torch.device | None = None) -> bool:
        """Return whether all ranks have the same digest, which must be equally long; the answer is the same on all.

        Parameters
        ----------
        device : where the backend's tensors must be; if None, objects are gathered, which takes one message more
        """
        if self.world_size == 1:
            return True
        if device is None:
            return len(set(self.gather_objects(digest))) == 1
        mine = torch.tensor(list(digest), dtype=torch.uint8).to(device)
        everyone = mine.new_empty(self.world_size * len(digest))
        with lost_ranks_named(self.board):
            _comm().all_gather_into_tensor(everyone, mine, group=self.process_group)
        return bool((everyone.view(self.world_size, -1) == mine).all())

    def barrier(self) -> None:
        if self.world_size > 1:
            with lost_ranks_named(self.board):
                _comm().barrier(group=self.process_group)

    def set_timeout(self, timeout_s: float) -> None:
        """Make each later collective of the group fail on this rank after so many seconds, whoever made the group.

        It holds for what `apart` and `part` made, too.
        """
        for made in self._made:
            made.set_timeout(timeout_s)
        if self.world_size > 1:
            torch.distributed.distributed_c10d._set_pg_timeout(
                datetime.timedelta(seconds=timeout_s), self.process_group
            )

    def _global_rank(self, rank: int) -> int:
        return int(torch.distributed.get_global_rank(self.process_group, rank % self.world_size))

    def _count_shared(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Count four all-to-alls: queries, keys, values, and an output shaped like the queries."""
        sent = sum(states.numel() * states.element_size() for states in (query, key, value, query))
        self.count_bytes(sent * (self.world_size - 1) // self.world_size)

    def _count(self, tensor: Tensor) -> None:
        self.count_bytes(tensor.numel() * tensor.element_size() * (self.world_size - 1))


def share_cpu_cores() -> None:
    """Limit this process to its share of the node's cores, so that the node's ranks do not compete for all of them.

    Does nothing if the user set ``OMP_NUM_THREADS``; torchrun sets it to 1 by default, which does not count.
    """
    local_ranks = ranks_on_node()
    asked = os.environ.get("OMP_NUM_THREADS")
    unasked = asked is None or (asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ)
    if local_ranks > 1 and unasked:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_ranks))


def world_group(timeout_s: float = DEFAULT_TIMEOUT_S, watch: Watch | None = None) -> SequenceGroup:
    """Return the group of all ranks; initialise it if a launcher started several and nobody has.

    Parameters
    ----------
    timeout_s : float, seconds
        How long a collective may take before it fails.
    watch : this process's, which then follows the group
    """
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not initialized and launched_world_size() == 1:
        return SequenceGroup()
    return _joined_group(timeout_s, watch)


def training_group(timeout_s: float = DEFAULT_TIMEOUT_S, watch: Watch | None = None) -> SequenceGroup:
    """Return the group of all ranks as `world_group` does, initialised even for one rank: DeepSpeed trains in a group.

    Parameters
    ----------
    timeout_s, watch : as of `world_group`
    """
    if launched_world_size() == 1 and not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
        os.environ.update(alone)
    return _joined_group(timeout_s, watch)


def _joined_group(timeout_s: float, watch: Watch | None) -> SequenceGroup:
    share_cpu_cores()
    deepspeed_comm_ready(timeout_s)
    group = SequenceGroup.of(torch.distributed.group.WORLD)
    if watch is not None:
        watch.follow(group)
    return group


def deepspeed_comm_ready(timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Initialise ``deepspeed.comm`` over the existing process group, else with the accelerator's backend."""
    deepspeed = importlib.import_module("deepspeed")
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    # Whoever initialised torch.distributed has already chosen this rank's device.
    if accelerator.device_name() != "cpu" and not torch.distributed.is_initialized():
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")) % accelerator.device_count())
    backend = accelerator.communication_backend_name()
    if backend == "gloo" and not torch.distributed.is_initialized():
        choose_gloo_interface()
    # Without priority, sending would start only after the computation that should hide it.
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
    """Start DeepSpeed's communication without its shared-memory op, which none of our collectives uses.

    DeepSpeed compiles it at the first start on CPU, which takes a minute. A rank that is killed while it compiles
    leaves a lock in torch's extensions directory, and every later start waits for that lock forever.
    """
    ops: Any = importlib.import_module("deepspeed.ops")
    name = "__compatible_ops__"  # DeepSpeed fills it lazily; an op that is not in it counts as incompatible
    before = ops.__dict__.get(name)
    ops.__dict__[name] = {}
    try:
        yield
    finally:
        del ops.__dict__[name]
        if before is not None:
            ops.__dict__[name] = before
