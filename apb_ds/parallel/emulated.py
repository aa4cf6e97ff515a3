"""Emulate one rank of a larger group in a single process, to time it.

Every collective returns at once: this rank's part is real, the other ranks' parts are random numbers of the right
shape and dtype. Bytes are counted as in a real group. Only prefill can run, because its work does not depend on values;
anything that ends in a broadcast (queries, decoding) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
class EmulatedGroup(SequenceGroup):
    """Rank `rank` of `world_size` emulated ranks, alone in its process.

    Attributes
    ----------
    peers : what the other ranks send; the ranks of one emulation may share it
    num_collectives : so far, of all prefills
    """

    peers: Peers = field(default_factory=Peers, compare=False, repr=False)
    num_collectives: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_integer("world_size", self.world_size, 1)
        check_integer("rank", self.rank, 0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank={self.rank} must be below world_size={self.world_size}.")

    def _new_group(self, parts: list[list[int]]) -> SequenceGroup:
        raise ValueError("emulated ranks have whole weights; use shard_weights=false.")

    @profiling.belongs_to(profiling.COMMUNICATION)
    def start_all_gather(self, tensor: Tensor, into: Tensor | None = None) -> PendingGather:
        if self.world_size == 1:
            return super().start_all_gather(tensor, into)
        tensor = tensor.contiguous()
        self._count(tensor)
        self.num_collectives += 1
        shape = self.world_size, *tensor.shape
        gathered = self.peers.buffer(tensor, shape) if into is None else into.view(shape)
        return EmulatedGather(gathered, sent=tensor, rank=self.rank)

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
        """Refuse, unless this rank is alone.

        Raises
        ------
        RuntimeError
            Queries and decoding depend on the other ranks' keys and values, which do not exist.
        """
        if self.world_size == 1:
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


def emulated_groups(world_size: int) -> list[EmulatedGroup]:
    """Return the groups of all ranks of an emulation; they share one `Peers`."""
    peers = Peers()
    return [EmulatedGroup(rank=rank, world_size=world_size, peers=peers) for rank in range(world_size)]
