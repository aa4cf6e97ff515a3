"""Layers that attend within a window: exact with every method, and cheaper than attention to all tokens.

A block sees itself and its halo, the last ``window - 1`` tokens before it (`apb_ds.methods.halo`). Those of its tokens
that see nothing of the halo are computed while it travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.methods.state import PrefillState, States, Tools
from apb_ds.ops.merge import empty_tokens_first


def prefill(
    tools: Tools, state: PrefillState, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, window: int
) -> Tensor:
    """Attend for this rank's tokens of the round; cache what the window still reaches after the last one.

    Parameters
    ----------
    query : (1, heads, tokens, head_dim), local, rotated: share of the anchor, blocks, padding
    key, value : (1, kv_heads, tokens, head_dim), local, keys rotated
    window : how many tokens a token sees, itself included

    Returns
    -------
    (1, heads, tokens, head_dim) in ``query.dtype``. Zeros in the last layer, whose output is not used.
    """
    parts = zip(*(states.split(state.lengths, dim=2) for states in (query, key, value)), strict=True)
    anchor, *blocks, _ = parts
    halo = state.halo(layer_idx, key, window)
    arrives = halo.start(tools.group, state.round_index, anchor[1:], [block[1:] for block in blocks])
    state.start_next_weights()
    if state.is_last_layer(layer_idx):
        output = torch.zeros_like(query)
        arrives()
    else:
        output = empty_tokens_first(query)
        of_anchor, *of_blocks, of_padding = output.split(state.lengths, dim=2)
        of_padding.zero_()
        mine = list(zip([anchor, *blocks], [of_anchor, *of_blocks], strict=True))
        for states, part in mine:
            _attend_within(tools, states, window, part)
        arrives()
        halos = [halo.of_anchor(state.rank), *map(halo.of_block, state.hosts)]
        for (states, part), before in zip(mine, halos, strict=True):
            _attend_to_halo(tools, states, window, before, part)
    tail = halo.finish_round()
    if state.is_last_round:
        state.store_tail(layer_idx, tail)
    state.finish_layer(layer_idx)
    return output


def _attend_within(tools: Tools, states: States, window: int, output: Tensor) -> None:
    """Attend for the tokens that are too far from the block's start to see anything before it."""
    query, key, value = states
    first = window - 1
    if query.shape[2] > first:
        output[:, :, first:] = tools.attend_causally(query[:, :, first:], key, value, window)[0]


def _attend_to_halo(tools: Tools, states: States, window: int, halo: Tensor, output: Tensor) -> None:
    """Attend for the block's other tokens, the first ones."""
    query, key, value = (part[:, :, : window - 1] for part in states)
    if query.shape[2] == 0:
        return
    keys, values = torch.cat([halo[0:1], key], dim=2), torch.cat([halo[1:2], value], dim=2)
    output[:, :, : window - 1] = tools.attend_causally(query, keys, values, window)[0]
