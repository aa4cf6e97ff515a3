"""Exact attention by DeepSpeed's sequence parallelism (Ulysses, arXiv 2309.14509).

Every rank has a share of the tokens. DeepSpeed's all-to-all turns that into a share of the heads with all tokens, and
back. It needs equally many tokens on every rank, so the document's tail is padded; causality hides the padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apb_ds.methods.state import PrefillState, Tools


def prefill(tools: Tools, state: PrefillState, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend exactly for this rank's block; cache it, without the padding.

    Parameters
    ----------
    query : (1, heads, block_tokens + padding, head_dim), local, rotated
    key, value : (1, kv_heads, block_tokens + padding, head_dim), local, keys rotated

    Returns
    -------
    (1, heads, block_tokens + padding, head_dim) in ``query.dtype``. Zeros in the last layer, whose output is not used.

    Raises
    ------
    ValueError
        If the heads do not divide over the ranks.
    """
    group = tools.group
    check_heads(query.shape[1], key.shape[1], group.world_size)
    if state.is_last_layer(layer_idx):
        state.store_blocks(layer_idx, key, value)
        state.finish_layer(layer_idx)
        return torch.zeros_like(query)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
        """Attend causally: all tokens, some heads, (1, tokens, heads, head_dim)."""
        state.store_blocks(layer_idx, key, value)
        queries, keys, values = (states.transpose(1, 2).contiguous() for states in (queries, keys, values))
        output, _lse = tools.of_own_heads().attend_causally(queries, keys, values)
        return output.transpose(1, 2).contiguous()

    tokens_first = [states.transpose(1, 2) for states in (query, key, value)]
    output = group.share_heads(attend)(*tokens_first)
    state.finish_layer(layer_idx)
    return output.transpose(1, 2)


def check_heads(heads: int, kv_heads: int, world_size: int) -> None:
    """Raise ValueError unless queries' and keys' heads divide evenly over the ranks."""
    if heads % world_size or kv_heads % world_size:
        raise ValueError(
            f"method=ulysses shares heads over ranks: the model's {heads} query heads and {kv_heads} KV heads must "
            f"both be multiples of the number of ranks ({world_size}); use method=ring, or fewer ranks."
        )
