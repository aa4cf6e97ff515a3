"""Merge attention over disjoint sets of keys from partial outputs and their log-sum-exps.

Computed in float32 and shifted by the maximum, so that no exponential overflows; outputs may be as large as half the
float32 maximum. A row that saw no key has log-sum-exp minus infinity and output 0, and leaves the other part unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.ops import profiling
from apb_ds.ops.compiled import compiled


@profiling.belongs_to(profiling.ATTENTION)
def merge_two(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, into: Tensor | None = None) -> Tensor:
    """Merge attention over two disjoint sets of keys.

    Parameters
    ----------
    out_a, out_b : (batch, heads, tokens, head_dim), softmax-weighted values over each set
    lse_a, lse_b : (batch, heads, tokens), float32, natural log
    into : tensor that receives the result; by default a new one

    Returns
    -------
    (batch, heads, tokens, head_dim) in ``out_a.dtype``
    """
    merged = _merge_two(out_a, lse_a, out_b, lse_b)
    return merged if into is None else into.copy_(merged)


@profiling.belongs_to(profiling.ATTENTION)
def merge_two_fused(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, into: Tensor | None = None) -> Tensor:
    """Merge as `merge_two` does, in one compiled kernel."""
    if into is None:
        into = empty_tokens_first(out_a)
    compiled(_merge_two_into)(into, out_a, lse_a, out_b, lse_b)
    return into


def empty_tokens_first(like: Tensor) -> Tensor:
    """Return an empty (batch, heads, tokens, head_dim) tensor laid out as (batch, tokens, heads, head_dim).

    That is how models project queries, and how they expect attention's output.
    """
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


@profiling.belongs_to(profiling.ATTENTION)
def merge_many(outs: Tensor, lses: Tensor) -> Tensor:
    """Merge attention over any number of disjoint sets of keys.

    Parameters
    ----------
    outs : (parts, batch, heads, tokens, head_dim)
    lses : (parts, batch, heads, tokens), float32, natural log

    Returns
    -------
    (batch, heads, tokens, head_dim), float32
    """
    top = lses.amax(dim=0)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    weights = torch.exp(lses - top)
    total = weights.sum(dim=0)
    # Normalise first: a sum of outputs could overflow float32, an average cannot.
    shares = weights / torch.where(total > 0, total, torch.ones_like(total))
    return (shares.unsqueeze(-1) * outs.float()).sum(dim=0)


@profiling.belongs_to(profiling.ATTENTION)
def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Count one more key per head, whose value is zero, in a partial output.

    Parameters
    ----------
    output : (batch, heads, tokens, head_dim)
    lse : (batch, heads, tokens), float32, natural log
    sinks : (heads,), logits of these keys

    Returns
    -------
    output in ``output.dtype`` and lse, float32, of the softmax over the keys and the sink
    """
    with_sink = torch.logaddexp(lse, sinks.float().view(1, -1, 1))
    return (output * torch.exp(lse - with_sink).unsqueeze(-1)).to(output.dtype), with_sink


def _merge_two_into(into: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    into.copy_(_merge_two(out_a, lse_a, out_b, lse_b))


def _merge_two(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    # In one softmax over both sets, set a would have the share exp(lse_a) / (exp(lse_a) + exp(lse_b)).
    share_a = torch.sigmoid(torch.nan_to_num(lse_a - lse_b, nan=0.0, posinf=torch.inf, neginf=-torch.inf))
    merged = torch.lerp(out_b.float(), out_a.float(), share_a.unsqueeze(-1))
    return merged.to(out_a.dtype)
