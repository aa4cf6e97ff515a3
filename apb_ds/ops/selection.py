"""Choose the tokens that a block passes on: the best scores, earlier tokens first among ties, in document order."""

from __future__ import annotations

import torch
from torch import Tensor


def select_by_sorting(scores: Tensor, count: int) -> Tensor:
    """Select as `select_top` does, the obvious way: sort stably, take the first `count`, sort those by position."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def select_top(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` best scores in ascending order; among equal scores the earlier tokens win.

    ``torch.topk`` does not define which of several equal scores it returns, so only its threshold is used: scores
    above it are kept, then ties by position. Nothing here waits for the device.

    Parameters
    ----------
    scores : (kv_heads, tokens), float32, not NaN
    count : 0 <= count <= tokens

    Returns
    -------
    (kv_heads, count), int64
    """
    heads, tokens = scores.shape
    if count == tokens:
        return torch.arange(tokens, device=scores.device).expand(heads, tokens)
    if count == 0:
        return scores.new_empty((heads, 0), dtype=torch.int64)
    threshold = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above = scores > threshold
    tied = scores == threshold
    room = count - above.sum(dim=-1, keepdim=True)
    kept = above | (tied & (tied.cumsum(dim=-1) <= room))
    # The i-th kept token goes to slot i; all others go to one slot past the end, which is cut off.
    slots = torch.where(kept, kept.cumsum(dim=-1) - 1, count)
    positions = torch.arange(tokens, device=scores.device).expand(heads, tokens)
    chosen = positions.new_empty((heads, count + 1))
    return chosen.scatter_(1, slots, positions)[:, :count]


def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """Pick tokens per KV head.

    Parameters
    ----------
    states : (1, kv_heads, tokens, head_dim)
    indices : (kv_heads, count), int64

    Returns
    -------
    (1, kv_heads, count, head_dim)
    """
    picked = indices.unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return states[0].gather(1, picked).unsqueeze(0)


def gather_pair(keys: Tensor, values: Tensor, indices: Tensor, into: Tensor) -> None:
    """Copy the keys and values of some tokens, chosen per KV head.

    Parameters
    ----------
    keys, values : (1, kv_heads, tokens, head_dim)
    indices : (kv_heads, count), int64
    into : (2, kv_heads, count, head_dim), keys first; may be a view
    """
    into[0:1] = gather_tokens(keys, indices)
    into[1:2] = gather_tokens(values, indices)


def copy_pair(keys: Tensor, values: Tensor, into: Tensor) -> None:
    """Copy keys and values, (1, kv_heads, tokens, head_dim) each, into (2, kv_heads, tokens, head_dim), keys first."""
    into[0:1] = keys
    into[1:2] = values
