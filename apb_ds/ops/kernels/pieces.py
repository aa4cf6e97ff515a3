"""Attention in plain torch, piece by piece: windows and capped logits for any backend, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_QUERIES = 512  # of one piece
# The same with a mask: 128 queries cost a window of 64 twice its keys, one of 1024 an eighth more.
MASKED_QUERIES = 128
# Logits of one tile, for all heads: 16 MiB in float32; the tile's keys and its values are no larger. Enough for real
# matrix products (32 heads: 512 queries x 256 keys), and little next to a model's weights. On CPU four times more or
# fewer took longer.
MAX_LOGITS = 2**22


@dataclass(frozen=True)
class Logits:
    """How a call makes logits of queries and keys; `Kernel.__call__` explains the fields."""

    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None


def attend_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, logits: Logits, num_last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what `Kernel.__call__` does, in float32 (float64 if the inputs are), with scratch of a fixed size.

    With `num_last`, compute what `Kernel.attend_last` does. Queries are cut into pieces and the keys that a piece sees
    into tiles, over which a running maximum rescales the sums (Milakov and Gimelshein, arXiv 1805.02867).
    """
    heads, queries, head_dim = query.shape[1:]
    kv_heads, keys = key.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = min(queries, MAX_QUERIES)
    columns = max(1, MAX_LOGITS // max(heads * rows, kv_heads * head_dim))
    output = query.new_empty(1, heads, queries, value.shape[3])
    lse = torch.empty(1, heads, queries, dtype=torch.float32, device=query.device)
    for start in range(0, queries, rows):
        piece = query[0, :, start : start + rows]
        stop = start + piece.shape[1]
        # One KV head's group of heads is one batch of rows: keys and values are not repeated.
        scaled = piece.to(dtype).mul(logits.scale).reshape(kv_heads, -1, head_dim)
        largest = scaled.new_full((*scaled.shape[:2], 1), torch.finfo(dtype).min)  # finite: a tile may be all masked
        total = torch.zeros_like(largest)
        summed = scaled.new_zeros(*scaled.shape[:2], value.shape[3])
        first, end = seen_keys(start, stop, queries, keys, logits)
        for left in range(first, end, columns):
            right = min(left + columns, end)
            tile = scaled @ key[0, :, left:right].to(dtype).transpose(1, 2)
            if logits.softcap is not None:
                tile.div_(logits.softcap).tanh_().mul_(logits.softcap)
            if logits.causal:
                hidden = hidden_keys(range(start, stop), range(left, right), keys - queries, logits.window, tile.device)
                tile.unflatten(1, (-1, stop - start)).masked_fill_(hidden, -torch.inf)
            if num_last is not None:
                hidden = earlier_keys(num_last[start:stop], range(left, right), keys)
                tile.unflatten(1, (-1, stop - start)).masked_fill_(hidden, -torch.inf)
            highest = torch.maximum(largest, tile.amax(dim=2, keepdim=True))
            shrink = (largest - highest).exp_()
            weights = tile.sub_(highest).exp_()
            total.mul_(shrink).add_(weights.sum(dim=2, keepdim=True))
            summed.mul_(shrink).add_(weights @ value[0, :, left:right].to(dtype))
            largest = highest
        # The largest logit counts 1, so a smaller total is that of a query that sees nothing.
        output[0, :, start:stop] = summed.div_(total.clamp_min(1)).reshape(heads, stop - start, -1)
        lse[0, :, start:stop] = total.log_().add_(largest).reshape(heads, stop - start)
    return output, lse


def seen_keys(start: int, stop: int, queries: int, keys: int, logits: Logits) -> tuple[int, int]:
    """Return the bounds of the keys that queries ``start..stop - 1`` see together."""
    if not logits.causal:
        return 0, keys
    offset = keys - queries
    first = 0 if logits.window is None else max(0, start + offset - logits.window + 1)
    return first, stop + offset


def hidden_keys(queries: range, keys: range, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of the keys each query does not see, (queries, keys), bool; query i is the key i + offset."""
    place = torch.arange(queries.start, queries.stop, device=device).add_(offset).unsqueeze(1)
    key = torch.arange(keys.start, keys.stop, device=device)
    hidden = key > place
    return hidden if window is None else hidden.logical_or_(key <= place - window)


def earlier_keys(num_last: Tensor, keys: range, total: int) -> Tensor:
    """Return which of the keys precede the last `num_last` of `total`, (queries, keys), bool."""
    key = torch.arange(keys.start, keys.stop, device=num_last.device)
    return key < total - num_last.unsqueeze(1)


class MaskedAttention(Protocol):
    """A backend that takes a mask to add to the logits, as `additive_mask` returns it."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, mask: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return minus infinity where `hidden`, else 0, in the queries' dtype."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def attend_in_windows(
    attend: MaskedAttention, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Attend with a window through a backend that takes a mask: each piece of queries with only the keys it sees."""
    queries, keys = query.shape[2], key.shape[2]
    logits = Logits(True, scale, window)
    outputs, lses = [], []
    for start in range(0, queries, MASKED_QUERIES):
        stop = min(start + MASKED_QUERIES, queries)
        first, end = seen_keys(start, stop, queries, keys, logits)
        hidden = hidden_keys(range(start, stop), range(first, end), keys - queries, window, query.device)
        mask = additive_mask(hidden, query.dtype)
        output, lse = attend(query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end], scale, mask=mask)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)
