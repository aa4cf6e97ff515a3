"""Prefill on one rank: round by round, what the model is fed, and the forward."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.attention import APBAttention, Phase
from apb_ds.hf.architecture import text_decoder
from apb_ds.hf.interface import ForwardComplete, PassingCache
from apb_ds.hf.stages import stage_of
from apb_ds.hf.zero3 import is_partitioned, releasing
from apb_ds.methods.state import PrefillState


def run_rounds(
    model: PreTrainedModel,
    attention: APBAttention,
    state: PrefillState,
    document_ids: Tensor,
    query_ids: Tensor | None,
) -> None:
    """Run every round of a prefill; see `run_round`."""
    stage, num_rounds = stage_of(model), len(state.plan.rounds)
    if stage is None:
        for round_index in range(num_rounds):
            state.start_round(round_index)
            run_round(model, attention, state, document_ids, query_ids)
        return
    # While a stage computes a round, the one before it computes the next. Steps may come between rounds alone: within
    # one, the next stage waits for its end.
    progress, state.progress = state.progress, None
    lengths = [state.plan.num_forward_tokens(state.rank, round_index) for round_index in range(num_rounds)]
    ahead = filter(None, lengths), document_ids.device
    with stage.connected(stage.pipeline.rounds, *(ahead if progress is None else ())):
        for round_index in range(num_rounds):
            state.start_round(round_index)
            run_round(model, attention, state, document_ids, query_ids)
            if progress is not None:
                progress(round_index + 1, num_rounds)


def run_round(
    model: PreTrainedModel,
    attention: APBAttention,
    state: PrefillState,
    document_ids: Tensor,
    query_ids: Tensor | None,
) -> None:
    """Run one forward over this rank's share of the anchor and its hosts' blocks; with neither, only the collectives.

    Needs `apb_ds.hf.interface.apb_attention` in force with the same `attention` and `state`.

    Parameters
    ----------
    state : PrefillState
        Says round and rank; its cache takes the blocks' keys and values.
    document_ids : (1, n), int64, global
    query_ids : (1, q), int64, global, or None where the anchor embeds none
    """
    ids, positions = round_inputs(state, document_ids, query_ids)
    if ids.shape[1] == 0 and is_partitioned(model):
        # Its weights' collectives are those of modules, so they run, with a token that stands in for none.
        ids, positions = document_ids[:, :1], torch.zeros_like(document_ids[:, :1])
    elif ids.shape[1] == 0:
        _join_round(model, attention, state)
        return
    try:
        with releasing(model):
            cache = PassingCache(state.take_from_cache)
            text_decoder(model)(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    except ForwardComplete:
        return
    raise RuntimeError("the last layer's attention was never called: the model does not use the engine's attention.")


def _join_round(model: PreTrainedModel, attention: APBAttention, state: PrefillState) -> None:
    """Join every layer's collectives without a token, since no forward may see zero tokens."""
    nothing = torch.empty((1, 1, 0, 1), dtype=model.dtype, device=next(model.parameters()).device)
    for layer_idx in state.layers:
        layer = state.cache.attention[layer_idx]
        if state.weights is not None:
            state.weights.enter(layer_idx)
        queries = nothing.expand(1, layer.heads, 0, layer.head_dim)
        keys = nothing.expand(1, layer.kv_heads, 0, layer.head_dim)
        values = nothing.expand(1, layer.kv_heads, 0, layer.value_dim)
        attention(queries, keys, values, phase=Phase.PREFILL, layer_idx=layer_idx, state=state, window=layer.window)


def round_inputs(state: PrefillState, document_ids: Tensor, query_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tokens of this rank's forward in the state's round, and their positions, (1, tokens) int64 each.

    The rank's share of the anchor comes first (``doc[:p] + query + doc[p:l_a - q]``, positions from 0), then the blocks
    of its hosts at their places in the document, then ulysses' padding.
    """
    plan = state.plan
    served = plan.served(state.rank, state.round_index)
    parts = [document_ids[:, slice(*plan.blocks[host])] for host in served]
    positions = [torch.arange(*plan.blocks[host], device=document_ids.device) for host in served]
    padding = plan.padding_length(state.rank)
    if padding:  # at the last position, since a larger one could change the rotary frequencies
        parts.append(document_ids[:, -1:].expand(1, padding))
        positions.append(torch.full((padding,), plan.num_tokens - 1, device=document_ids.device))
    start, stop = state.anchor_share
    if stop > start:
        anchor = document_ids[:, : plan.anchor_length]
        if query_ids is not None and plan.anchor_query_length:
            before, after = document_ids[:, : plan.query_position], document_ids[:, plan.query_position :]
            anchor = torch.cat([before, query_ids, after], dim=-1)[:, : plan.anchor_length]
        parts.insert(0, anchor[:, start:stop])
        positions.insert(0, torch.arange(start, stop, device=document_ids.device))
    return torch.cat(parts, dim=-1), torch.cat(positions).unsqueeze(0)
