"""Exact attention around a ring of ranks (arXiv 2310.01889), with balanced work.

The document is cut into 2W blocks, and rank r has blocks r and 2W-1-r: an early one, which sees little, and a late one,
which sees much. Keys and values travel around the ring; while the next ones are in flight, a rank attends to those it
has. From an earlier rank, both of its blocks see the early half; from a later rank, its late block sees everything. So
every step costs every rank the same, and the kernels need only square causal and unmasked attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.methods.state import PrefillState, Tools
from apb_ds.plan import Plan


def prefill(tools: Tools, state: PrefillState, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend exactly for this rank's two blocks; cache them; pass all keys and values around.

    Parameters
    ----------
    query : (1, heads, early + late, head_dim), local, rotated
    key, value : (1, kv_heads, early + late, head_dim), local, keys rotated

    Returns
    -------
    (1, heads, early + late, head_dim) in ``query.dtype``. Zeros in the last layer, whose output is not used.
    """
    plan, group = state.plan, tools.group
    if state.is_last_layer(layer_idx):
        state.store_blocks(layer_idx, key, value)
        state.finish_layer(layer_idx)
        return torch.zeros_like(query)
    travelling = _Travelling(plan)
    early = plan.block_length(group.rank)
    pending = group.start_shift(travelling.pack(group.rank, key, value))
    state.store_blocks(layer_idx, key, value)
    running = _Running(query)
    # The early block precedes the late one, so that together they attend causally like one.
    running.attend(tools, key, value, causal=True)
    for step in range(1, group.world_size):
        message = pending.wait()
        if step < group.world_size - 1:
            pending = group.start_shift(message)
        source = (group.rank - step) % group.world_size
        if source < group.rank:
            running.attend(tools, *travelling.early(message, source))
        else:
            running.attend(tools, *travelling.both(message, source), first_row=early)
    state.finish_layer(layer_idx)
    return running.output.to(query.dtype)


class _Running:
    """The attention output so far, in float32, with its log-sum-exp."""

    def __init__(self, query: Tensor) -> None:
        self.query = query
        self.output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        self.lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)

    def attend(self, tools: Tools, keys: Tensor, values: Tensor, *, causal: bool = False, first_row: int = 0) -> None:
        """Attend to further keys with the queries from `first_row` on, and merge."""
        query = self.query[:, :, first_row:]
        if query.shape[2] == 0 or keys.shape[2] == 0:
            return
        output, lse = (tools.attend_causally if causal else tools.attend)(query, keys, values)
        before = self.output[:, :, first_row:], self.lse[:, :, first_row:]
        self.output[:, :, first_row:] = tools.merge_two(*before, output.float(), lse)
        self.lse[:, :, first_row:] = torch.logaddexp(before[1], lse)


class _Travelling:
    """Messages of keys and values, of one size for all ranks: ``[unused | early block | late block | unused]``."""

    def __init__(self, plan: Plan) -> None:
        self.lengths = [plan.block_length(host) for host in range(plan.hosts)]
        self.middle = max(self.lengths[: plan.world_size])
        self.size = self.middle + max(self.lengths[plan.world_size :])

    def pack(self, rank: int, keys: Tensor, values: Tensor) -> Tensor:
        """Return (2, kv_heads, size, head_dim), keys first."""
        start = self.middle - self.lengths[rank]
        message = keys.new_zeros((2, keys.shape[1], self.size, keys.shape[3]))
        message[0:1, :, start : start + keys.shape[2]] = keys
        message[1:2, :, start : start + keys.shape[2]] = values
        return message

    def early(self, message: Tensor, source: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the early block of the rank that sent it; views."""
        start = self.middle - self.lengths[source]
        return message[0:1, :, start : self.middle], message[1:2, :, start : self.middle]

    def both(self, message: Tensor, source: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of both blocks of the rank that sent them; views."""
        start = self.middle - self.lengths[source]
        stop = self.middle + self.lengths[len(self.lengths) - 1 - source]
        return message[0:1, :, start:stop], message[1:2, :, start:stop]
