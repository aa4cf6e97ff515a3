"""Emulate one rank of a larger group in a single process, to time it.

Every collective returns at once: this rank's part is real, the other ranks' parts are random numbers of the right
shape and dtype. Bytes are counted as in a real group. Only prefill can run, because its work does not depend on values;
anything that ends in a broadcast (queries, decoding) is refused.

Where ranks hold parts of the weights, the other parts are copies of this rank's, and gathered weights are written while
others are used, as a real gather does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apb_ds.config import check_integer
from apb_ds.ops import profiling
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.pending import PendingGather, PendingShift

PEER_SEED = 0


class Peers:
    """What other ranks send: one random buffer per kind of message, drawn once, so that drawing is not timed."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def buffer(self, like: Tensor, shape: tuple[int, ...], kind: str = "") -> Tensor:
        """Return a standard normal tensor of `shape` with the dtype and device of `like`; the same one each time."""
        key = (kind, shape, like.dtype, like.device)
        if key not in self._buffers:
            generator = torch.Generator(like.device).manual_seed(PEER_SEED)
            self._buffers[key] = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
        return self._buffers[key]


@dataclass
class EmulatedGather(PendingGather):
    """An all-gather in which only this rank's part is real. Use the result before the next gather overwrites it."""

    rank: int = 0

    @profiling.belongs_to(profiling.COMMUNICATION)
    def wait(self) -> Tensor:
        if self.sent is not None:
            self.gathered[self.rank] = self.sent
            self.sent = None
        return self.gathered


@dataclass
class CopiedGather(PendingGather):
    """An all-gather in which every rank's part is a copy of this rank's, made on another stream."""

    copied: torch.cuda.Event | None = None

    @profiling.belongs_to(profiling.COMMUNICATION)
    def wait(self) -> Tensor:
        if self.copied is not None:
            self.copied.wait()
            self.copied = self.sent = None
        return self.gathered


@dataclass
class EmulatedGroup(SequenceGroup):
    """Rank `rank` of `world_size` emulated ranks, alone in its process.

    Attributes
    ----------
    peers : what the other ranks send; the ranks of one emulation may share it
    num_collectives : so far
    copies : whether the other ranks' parts are copies of this rank's. Queries and decoding then run, too, for their
        time: their answers mean nothing.
    """

    peers: Peers = field(default_factory=Peers, compare=False, repr=False)
    num_collectives: int = field(default=0, compare=False)
    copies: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        check_integer("world_size", self.world_size, 1)
        check_integer("rank", self.rank, 0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank={self.rank} must be below world_size={self.world_size}.")

    def _new_group(self, parts: list[list[int]]) -> SequenceGroup:
        mine = next(ranks for ranks in parts if self.rank in ranks)
        return EmulatedGroup(
            rank=mine.index(self.rank), world_size=len(mine), copies=self.copies, _made_from=self, _made_with=parts
        )

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_all_gather(self, tensor: Tensor, into: Tensor | None = None) -> PendingGather:
        if self.world_size == 1:
            return super().start_all_gather(tensor, into)
        tensor = tensor.contiguous()
        self._count(tensor)
        self.num_collectives += 1
        shape = self.world_size, *tensor.shape
        if into is not None:
            return _copied(tensor, into.view(shape))
        if self.copies:
            return PendingGather(tensor.expand(shape).contiguous())
        return EmulatedGather(self.peers.buffer(tensor, shape), sent=tensor, rank=self.rank)

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_shift(self, tensor: Tensor) -> PendingShift:
        if self.world_size == 1:
            return super().start_shift(tensor)
        tensor = tensor.contiguous()
        self.count_bytes(tensor.numel() * tensor.element_size())
        self.num_collectives += 1
        return PendingShift(self.peers.buffer(tensor, tuple(tensor.shape)), sent=tensor)

    def share_heads(self, attend: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self.world_size == 1:
            return attend

        @profiling.belongs_to(profiling.COMMUNICATION)
        def exchange(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            given = {"query": query, "key": key, "value": value}
            everyone = [self._with_all_tokens(states, kind) for kind, states in given.items()]
            of_some_heads = attend(*everyone)
            output = self.peers.buffer(query, tuple(query.shape), "output")
            tokens, heads = self._own(query.shape[1]), self._own(of_some_heads.shape[2])
            output[:, :, heads] = of_some_heads[:, tokens]
            self._count_shared(query, key, value)
            self.num_collectives += 4
            return output

        return exchange

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Refuse, unless this rank is alone or the others' parts are copies.

        Raises
        ------
        RuntimeError
            Queries and decoding depend on the other ranks' keys and values, which do not exist.
        """
        if self.world_size == 1 or self.copies:
            return tensor
        raise RuntimeError("an emulated group only runs prefills: the other ranks' keys and values are random.")

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def is_same(self, digest: bytes, device: torch.device | None = None) -> bool:
        return True

    def barrier(self) -> None:
        """Do nothing: no other rank exists."""

    def set_timeout(self, timeout_s: float) -> None:
        """Do nothing: no collective waits."""

    def _members(self) -> list[int]:
        return list(range(self.world_size))

    def _with_all_tokens(self, states: Tensor, kind: str) -> Tensor:
        """Return (1, tokens W, heads / W, head_dim), in which this rank's tokens are real."""
        _, tokens, heads, head_dim = states.shape
        shape = (1, tokens * self.world_size, heads // self.world_size, head_dim)
        everyone = self.peers.buffer(states, shape, kind)
        everyone[:, self._own(tokens)] = states[:, :, self._own(heads // self.world_size)]
        return everyone

    def _own(self, share: int) -> slice:
        return slice(self.rank * share, (self.rank + 1) * share)


def _copied(tensor: Tensor, into: Tensor) -> PendingGather:
    """Copy a rank's part into every rank's place."""
    if tensor.device.type != "cuda":
        into.copy_(tensor.expand_as(into))
        return PendingGather(into)
    stream, copied = _copying_stream(tensor.device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        into.copy_(tensor.expand_as(into))
        copied.record(stream)
    return CopiedGather(into, sent=tensor, copied=copied)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def emulated_groups(world_size: int) -> list[EmulatedGroup]:
    """Return the groups of all ranks of an emulation; they share one `Peers`."""
    peers = Peers()
    return [EmulatedGroup(rank=rank, world_size=world_size, peers=peers) for rank in range(world_size)]
