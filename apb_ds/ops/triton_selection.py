"""Selection and gathering as one Triton kernel each. Imported only on CUDA.

`apb_ds.ops.selection` computes the same with some twenty operations, which take longer to launch than a short block
takes to compute.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_PER_STEP = 1024
ROWS_PER_PROGRAM = 32


@triton.jit(do_not_specialize=["count", "tokens", "first"])
def _select_kernel(scores, best, indices, count, tokens, first, score_stride, best_stride, STEP: tl.constexpr):
    """Write the indices of one KV head's kept tokens: all above the lowest of the best scores, then ties in order."""
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, STEP)
    scores += head * score_stride
    indices += head * count
    lowest = float("inf")
    for start in range(0, count, STEP):
        inside = start + columns < count
        values = tl.load(best + head * best_stride + start + columns, mask=inside, other=float("inf"))
        lowest = tl.minimum(lowest, tl.min(values, axis=0))
    room = count
    for start in range(0, tokens, STEP):
        inside = start + columns < tokens
        values = tl.load(scores + start + columns, mask=inside, other=float("-inf"))
        room -= tl.sum((inside & (values > lowest)).to(tl.int32), axis=0)
    num_tied = 0
    num_kept = 0
    for start in range(0, tokens, STEP):
        inside = start + columns < tokens
        values = tl.load(scores + start + columns, mask=inside, other=float("-inf"))
        tied = (inside & (values == lowest)).to(tl.int32)
        has_room = num_tied + tl.cumsum(tied, axis=0) <= room
        kept = (inside & ((values > lowest) | ((tied > 0) & has_room))).to(tl.int32)
        slots = num_kept + tl.cumsum(kept, axis=0) - 1
        tl.store(indices + slots, (first + start + columns).to(tl.int64), mask=kept > 0)
        num_tied += tl.sum(tied, axis=0)
        num_kept += tl.sum(kept, axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    keys,
    values,
    indices,
    out_keys,
    out_values,
    num_rows,
    index_stride,
    key_head,
    key_token,
    value_head,
    value_token,
    out_key_head,
    out_key_token,
    out_value_head,
    out_value_token,
    head_dim: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy the keys and values of some tokens of one KV head."""
    head = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < num_rows
    picked = tl.load(indices + head * index_stride + rows, mask=inside, other=0)
    channels = tl.arange(0, CHANNELS)
    mask = inside[:, None] & (channels < head_dim)[None, :]
    states = tl.load(keys + head * key_head + picked[:, None] * key_token + channels[None, :], mask=mask)
    out_keys += head * out_key_head
    tl.store(out_keys + rows[:, None] * out_key_token + channels[None, :], states, mask=mask)
    states = tl.load(values + head * value_head + picked[:, None] * value_token + channels[None, :], mask=mask)
    out_values += head * out_value_head
    tl.store(out_values + rows[:, None] * out_value_token + channels[None, :], states, mask=mask)


def select_top(scores: Tensor, count: int, first: int = 0) -> Tensor:
    """Select as `apb_ds.ops.selection.select_top` does, and add `first` to every index.

    Parameters
    ----------
    scores : (kv_heads, tokens), float32, not NaN
    count : 1 <= count < tokens
    """
    heads, tokens = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    best = scores.topk(count, dim=-1, sorted=False).values
    indices = torch.empty((heads, count), dtype=torch.int64, device=scores.device)
    with torch.cuda.device_of(scores):  # Triton launches on the current device
        _select_kernel[(heads,)](
            scores, best, indices, count, tokens, first, scores.stride(0), best.stride(0), STEP=TOKENS_PER_STEP
        )
    return indices


def gather_pair(keys: Tensor, values: Tensor, indices: Tensor, into: Tensor) -> None:
    """Copy as `apb_ds.ops.selection.gather_pair` does; the channels of a head must be contiguous in all tensors."""
    heads, num_rows = indices.shape
    if num_rows == 0:
        return
    head_dim = keys.shape[-1]
    states = keys, values, into[0:1], into[1:2]
    assert all(tensor.stride(-1) == 1 for tensor in states) and indices.stride(1) == 1
    strides = [tensor.stride(dim) for tensor in states for dim in (1, 2)]
    grid = (triton.cdiv(num_rows, ROWS_PER_PROGRAM), heads)
    with torch.cuda.device_of(keys):
        _gather_kernel[grid](
            keys,
            values,
            indices,
            into[0],
            into[1],
            num_rows,
            indices.stride(0),
            *strides,
            head_dim=head_dim,
            CHANNELS=triton.next_power_of_2(head_dim),
            ROWS=ROWS_PER_PROGRAM,
        )
