"""What a block sees of the document before it in a layer with a window: the last ``window - 1`` tokens, its halo.

These are in one or more blocks before it, which other ranks may have computed, now or in an earlier round. So in every
round each rank sends the ends of its blocks to all, up to ``window - 1`` tokens of each; what a later round can see is
kept. The anchor's shares do likewise among themselves. No block sees the anchor: it is further away than the window, or
the halo holds what is left of it as document tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from apb_ds.methods.passed import Arrival
from apb_ds.ops.selection import copy_pair
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan

KeysAndValues = Sequence[Tensor]  # (1, kv_heads, tokens, head_dim) each


class Halo:
    """The halos of one layer on one rank. In each round: `start`, wait, read, `finish_round`.

    What it returns is keys and values, (2, kv_heads, tokens, head_dim), in document order.

    Parameters
    ----------
    plan : how the request is split
    window : how many tokens a token sees, itself included
    like : keys, for their shape, dtype and device
    """

    def __init__(self, plan: Plan, window: int, like: Tensor) -> None:
        self._plan = plan
        self._reach = window - 1
        self._before = like.new_empty((2, like.shape[1], 0, like.shape[3]))  # of this round's first block
        self._anchor: list[Tensor] = []  # the ends of the ranks' shares
        self._ends: dict[int, Tensor] = {}  # of this round's blocks, by host, in order

    def start(
        self, group: SequenceGroup, round_index: int, anchor: KeysAndValues, blocks: Sequence[KeysAndValues]
    ) -> Arrival:
        """Start sending the ends of this rank's share of the anchor and of its blocks; returns what waits for all.

        Parameters
        ----------
        anchor : of the rank's share in this round, local
        blocks : of each of the rank's blocks in this round, local
        """
        plan = self._plan
        turns = list(zip(*plan.rounds[round_index], strict=True))
        lengths = [[min(self._reach, plan.block_length(host)) for host in turn] for turn in turns]
        mine = list(blocks)
        shares_anchor = round_index == 0 and plan.shard_anchor and plan.anchor_length > 0
        if shares_anchor:
            shares = (plan.anchor_share(rank, 0) for rank in range(plan.world_size))
            lengths.append([min(self._reach, stop - start) for start, stop in shares])
            mine.append(anchor)
        _, kv_heads, _, head_dim = self._before.shape
        messages = self._before.new_empty((len(mine), 2, kv_heads, max(map(max, lengths)), head_dim))
        for message, (keys, values), of_ranks in zip(messages, mine, lengths, strict=True):
            count = of_ranks[group.rank]
            end = slice(keys.shape[2] - count, None)
            copy_pair(keys[:, :, end], values[:, :, end], message[:, :, :count])
        pending = group.start_all_gather(messages)

        def arrive() -> None:
            everyone = pending.wait()  # (ranks, turns, 2, kv_heads, tokens, head_dim)
            ends = [
                [everyone[rank, index, :, :, :count] for rank, count in enumerate(of_ranks)]
                for index, of_ranks in enumerate(lengths)
            ]
            self._anchor = ends.pop() if shares_anchor else []
            hosts = itertools.chain.from_iterable(turns)
            self._ends = dict(sorted(zip(hosts, itertools.chain.from_iterable(ends), strict=True)))

        return arrive

    def of_anchor(self, rank: int) -> Tensor:
        """Return the halo of the rank's share of the anchor."""
        return self._last([self._before[:, :, :0], *self._anchor[:rank]])

    def of_block(self, host: int) -> Tensor:
        """Return the halo of a block of this round."""
        return self._last([self._before, *(end for other, end in self._ends.items() if other < host)])

    def finish_round(self) -> Tensor:
        """Keep, and return, what follows this round's last block sees of the document."""
        self._before = self._last([self._before, *self._ends.values()]).clone()
        self._anchor, self._ends = [], {}
        return self._before

    def _last(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the last ``window - 1`` tokens of parts that follow each other."""
        taken: list[Tensor] = []
        room = self._reach
        for part in reversed(parts):
            taken.insert(0, part[:, :, max(0, part.shape[2] - room) :])
            room -= taken[0].shape[2]
        return torch.cat(taken, dim=2)
