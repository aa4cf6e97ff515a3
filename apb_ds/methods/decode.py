"""Exact attention of new tokens over the sharded cache: each rank attends to its shard, then outputs are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.methods.state import Tools
from apb_ds.ops.kernels import Kernel
from apb_ds.ops.merge import merge_many, merge_two

FLOAT_BYTES = 4
MAX_GATHERED_BYTES = 2**28  # of all ranks' partial outputs at a time


def attend_shards(tools: Tools, kernel: Kernel, query: Tensor, keys: Tensor, values: Tensor, holds_new: bool) -> Tensor:
    """Attend for new tokens, the same on every rank, over everything cached and causally among themselves.

    Parameters
    ----------
    query : (1, heads, new_tokens, head_dim), the same on every rank
    keys, values : (1, kv_heads, shard_tokens, head_dim), local
    holds_new : whether this is the rank that stores the new tokens; they are its last ones

    Returns
    -------
    (1, heads, new_tokens, head_dim) in ``query.dtype``, the same on every rank
    """
    output, lse = _attend_shard(tools, kernel, query, keys, values, holds_new)
    return merge_ranks(tools, output, lse)


def attend_window(tools: Tools, query: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Attend for new tokens within a window, whose keys and values every rank has.

    Parameters
    ----------
    query : (1, heads, new_tokens, head_dim), the same on every rank; of the last token alone
        where the model needs no more
    keys, values : (1, kv_heads, up to window - 1 + new_tokens, head_dim), the same on every rank; the new tokens last
    window : how many tokens a token sees, itself included

    Returns
    -------
    (1, heads, new_tokens, head_dim) in ``query.dtype``, the same on every rank
    """
    if query.shape[2] == 1:  # sees all that its window reaches: no mask
        keys, values = keys[:, :, -window:], values[:, :, -window:]
        return tools.with_sinks(tools.attend(query, keys, values, kernel=tools.kernels.decode))[0]
    return tools.attend_causally(query, keys, values, window)[0]


def merge_ranks(tools: Tools, output: Tensor, lse: Tensor) -> Tensor:
    """Merge the ranks' partial outputs, in one collective; in several for a query of many thousand tokens.

    Parameters
    ----------
    output : (1, heads, new_tokens, head_dim), local
    lse : (1, heads, new_tokens), float32, natural log, local

    Returns
    -------
    (1, heads, new_tokens, head_dim) in ``output.dtype``, the same on every rank
    """
    if tools.group.world_size == 1:
        return output
    bytes_per_token = tools.group.world_size * output.shape[1] * (output.shape[3] + 1) * FLOAT_BYTES
    piece = max(1, MAX_GATHERED_BYTES // bytes_per_token)
    merged = []
    for outputs, lses in zip(output.split(piece, dim=2), lse.split(piece, dim=2), strict=True):
        packed = torch.cat([outputs.float(), lses.unsqueeze(-1)], dim=-1)
        gathered = tools.group.all_gather(packed)
        merged.append(merge_many(gathered[..., :-1], gathered[..., -1]).to(output.dtype))
    return torch.cat(merged, dim=2) if len(merged) > 1 else merged[0]


def _attend_shard(
    tools: Tools, kernel: Kernel, query: Tensor, keys: Tensor, values: Tensor, holds_new: bool
) -> tuple[Tensor, Tensor]:
    num_new = query.shape[2]
    if num_new == 1:  # sees all that is stored: no mask
        one = tools.attend(query, keys, values, kernel=kernel) if keys.shape[2] else saw_nothing(query)
        # Always on the same rank, as in recorded steps, which others may run at the same token.
        return tools.with_sinks(one) if tools.group.is_last else one
    num_past = keys.shape[2] - num_new if holds_new else keys.shape[2]
    past = None
    if num_past > 0:
        past = tools.attend(query, keys[:, :, :num_past], values[:, :, :num_past], kernel=kernel)
    if not holds_new:
        return past if past is not None else saw_nothing(query)
    new = tools.attend_causally(query, keys[:, :, num_past:], values[:, :, num_past:])
    if past is None:
        return new
    return merge_two(*past, *new), torch.logaddexp(past[1], new[1])


def saw_nothing(query: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial output of queries, (1, heads, tokens, head_dim), that see no keys: zeros, and -inf."""
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    return torch.zeros_like(query), lse
