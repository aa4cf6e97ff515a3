"""Exact attention on one rank, in one forward over the whole document."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.methods.state import PrefillState, Tools


def prefill(tools: Tools, state: PrefillState, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally to the document; cache it.

    Parameters
    ----------
    query : (1, heads, n, head_dim), rotated
    key, value : (1, kv_heads, n, head_dim), keys rotated

    Returns
    -------
    (1, heads, n, head_dim) in ``query.dtype``. Zeros in the last layer, whose output is not used.
    """
    state.store_blocks(layer_idx, key, value)
    output = torch.zeros_like(query)
    if not state.is_last_layer(layer_idx):
        output, _ = tools.attend_causally(query, key, value)
    state.finish_layer(layer_idx)
    return output
