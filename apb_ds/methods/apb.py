"""APB's prefill attention in one layer and one round (arXiv 2502.12085, section 3).

A rank's tokens in a round are its share of the anchor (first round only), followed by the blocks of its hosts. Anchor
shares and compressed blocks are sent before the local attention and used after it, so that communication hides behind
computation. The kernels need only square causal and unmasked attention.

Every rank runs the same collectives in every layer and round, even without tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor
from apb_ds.methods.passed import Arrival, PassedStates, PassingBlocks, nothing_to_wait_for
from apb_ds.methods.state import Part, PrefillState, States, Tools
from apb_ds.ops.merge import empty_tokens_first
from apb_ds.plan import split_evenly


def prefill(
    compressor: Compressor,
    tools: Tools,
    state: PrefillState,
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Attend for this rank's tokens of the round; cache the blocks; exchange anchor and compressed blocks.

    Parameters
    ----------
    query : (1, heads, anchor_share + block_tokens, head_dim), local, rotated; the blocks of the rank's hosts
        follow each other
    key, value : (1, kv_heads, anchor_share + block_tokens, head_dim), local, keys rotated

    Returns
    -------
    (1, heads, anchor_share + block_tokens, head_dim) in ``query.dtype``. Zeros in the last layer, whose
    output is not used: prefill leaves only keys and values behind.
    """
    plan = state.plan
    if state.is_last_layer(layer_idx):
        state.store_blocks(layer_idx, key, value)
        state.finish_layer(layer_idx)
        return torch.zeros_like(query)

    anchor, *blocks, _ = zip(*(states.split(state.lengths, dim=2) for states in (query, key, value)), strict=True)
    passed = state.passed(layer_idx, key, tools.fused)
    anchor_arrives = _start_anchor(compressor, tools, state, passed, anchor)
    kept_arrives = _start_kept(compressor, tools, state, passed, layer_idx, blocks)
    # Stored between sending and attending: attention holds every multiprocessor while it runs, so a collective that is
    # not under way by then starts after it; copies hold them only briefly.
    state.store_blocks(layer_idx, key, value)
    blocks_local = [_attend_causally(tools, block) for block in blocks]
    anchor_local = _attend_causally(tools, anchor)
    output = empty_tokens_first(query)
    anchor_output, *block_outputs, _ = output.split(state.lengths, dim=2)
    anchor_arrives()
    _merge_with(tools, anchor[0], anchor_local, passed.first(state.anchor_share[0]), anchor_output)
    kept_arrives()
    seen = [plan.num_seen(host) for host in state.hosts]
    keys, values = passed.first(max(seen))
    for block, local, num_seen, block_output in zip(blocks, blocks_local, seen, block_outputs, strict=True):
        others = keys[:, :, :num_seen], values[:, :, :num_seen]
        _merge_with(tools, block[0], local, others, block_output)
    state.finish_layer(layer_idx)
    return output


def _attend_causally(tools: Tools, states: States) -> Part | None:
    query, key, value = states
    return tools.attend_causally(query, key, value) if query.shape[2] else None


def _merge_with(
    tools: Tools,
    query: Tensor,
    local: Part | None,
    others: tuple[Tensor, Tensor],
    output: Tensor,
) -> None:
    """Merge the local causal part with unmasked attention to other blocks' keys and values, into `output`."""
    if local is None:
        return
    keys, values = others
    if keys.shape[2] == 0:
        output.copy_(local[0])
    else:
        tools.merge_two(*local, *tools.attend(query, keys, values), output)


def _start_anchor(
    compressor: Compressor, tools: Tools, state: PrefillState, passed: PassedStates, anchor: States
) -> Arrival:
    """Start the exchange of anchor shares; only the first round has any."""
    if state.round_index > 0 or state.plan.anchor_length == 0:
        return nothing_to_wait_for
    query, key, value = anchor
    if compressor.needs_anchor_queries:
        passed.anchor_queries = _gather_anchor_queries(tools, state, query)
    return passed.start_anchor(tools.group, key, value)


def _gather_anchor_queries(tools: Tools, state: PrefillState, query: Tensor) -> Tensor:
    """Return the anchor's query tokens' query vectors, (1, heads, query_tokens, head_dim), on every rank."""
    plan, group = state.plan, tools.group
    first, last = plan.anchor_query_span
    if group.world_size == 1 or not plan.shard_anchor:
        return query[:, :, first:last].clone()  # a view would keep all queries of the layer until the end
    overlaps = []
    for start, stop in split_evenly(plan.anchor_length, group.world_size):
        begin = min(max(first, start), stop)
        overlaps.append((begin - start, max(begin, min(last, stop)) - start))
    longest = max(end - begin for begin, end in overlaps)
    begin, end = overlaps[group.rank]
    mine = query.new_zeros((*query.shape[:2], longest, query.shape[3]))
    mine[:, :, : end - begin] = query[:, :, begin:end]
    gathered = group.all_gather(mine)
    return torch.cat(
        [part[:, :, : end - begin] for (begin, end), part in zip(overlaps, gathered, strict=True)],
        dim=2,
    )


def _start_kept(
    compressor: Compressor,
    tools: Tools,
    state: PrefillState,
    passed: PassedStates,
    layer_idx: int,
    blocks: Sequence[States],
) -> Arrival:
    """Compress this rank's blocks and start the exchange of what the round's hosts keep."""
    served = state.plan.rounds[state.round_index]
    if not any(state.plan.is_passed_on(host) for hosts in served for host in hosts):
        return nothing_to_wait_for
    passing = _passing_blocks(tools, state, passed, layer_idx, blocks)
    return passed.start_kept(compressor, tools.group, served, passing, blocks[0][1])


def _passing_blocks(
    tools: Tools,
    state: PrefillState,
    passed: PassedStates,
    layer_idx: int,
    blocks: Sequence[States],
) -> PassingBlocks:
    """Yield what the compressor sees of each block that passes something on.

    The layer's projections are released once the last block has been read, since attention needs the memory.
    """
    plan = state.plan
    of_hosts = zip(state.hosts, blocks, state.take_projections(), strict=True)
    for index, (host, (query, key, value), projections) in enumerate(of_hosts):
        if plan.is_passed_on(host):
            yield (
                index,
                host,
                BlockStates(
                    queries=query,
                    keys=key,
                    values=value,
                    start=plan.blocks[host][0],
                    layer_idx=layer_idx,
                    scale=tools.scale,
                    anchor_queries=passed.anchor_queries,
                    projections=_joined(projections) if plan.is_scored(host) else None,
                    fused=tools.fused,
                ),
            )


def _joined(projections: tuple[Tensor, ...] | None) -> Tensor | None:
    """Return one block's projections as one tensor, (1, block_tokens, channels)."""
    if projections is None or len(projections) == 1:
        return None if projections is None else projections[0]
    return torch.cat(projections, dim=-1)
