"""APB's prefill attention in one layer and one round (arXiv 2502.12085, section 3).

A rank's tokens in a round are its share of the anchor, if it has one in this round, followed by the blocks of its
hosts. What travels (anchor shares and compressed blocks) is sent before the local attention and used after it, so that
communication hides behind computation. Only square causal and unmasked attention is needed.

Every rank runs the same collectives in every layer and round, also with no token of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates
from apb_ds.methods.passed import OwnStates, PassedStates, SentStates
from apb_ds.methods.state import PrefillState, Tools
from apb_ds.ops.merge import empty_tokens_first
from apb_ds.ops.selection import place_pair
from apb_ds.plan import Plan, split_evenly

Arrival = Callable[[], None]  # waits for what was sent and puts it where the attention finds it
States = Sequence[Tensor]  # queries, keys and values of the same tokens


def prefill(
    tools: Tools, state: PrefillState, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attend for this rank's tokens of the round; cache the blocks; exchange anchor and compressed blocks.

    Parameters
    ----------
    query : (1, heads, anchor_share + block_tokens, head_dim), local, rotated; the blocks of the rank's hosts one behind
        the other
    key, value : (1, kv_heads, anchor_share + block_tokens, head_dim), local, keys rotated
    scale : factor on the logits

    Returns
    -------
    (1, heads, anchor_share + block_tokens, head_dim) in ``query.dtype``. Zeros in the last layer: its output is used
    by nobody, since prefill leaves keys and values behind and nothing else.
    """
    plan = state.plan
    start, stop = state.anchor_share
    lengths = [stop - start, *(plan.block_length(host) for host in state.hosts)]
    if state.is_last_layer(layer_idx):
        _store(state, layer_idx, key[:, :, lengths[0] :], value[:, :, lengths[0] :])
        state.finish_layer(layer_idx)
        return torch.zeros_like(query)

    anchor, *blocks = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    passed = state.passed(layer_idx, key, tools.fused)
    anchor_arrives = _send_anchor(tools, state, passed, anchor)
    kept_arrives = _send_kept(tools, state, passed, layer_idx, blocks, scale)
    # Here, since attention takes every multiprocessor for as long as it lasts, and a collective that is not under way
    # by then begins after it. Copies hold none for long.
    _store(state, layer_idx, key[:, :, lengths[0] :], value[:, :, lengths[0] :])
    blocks_local = [_attend_causally(tools, block, scale) for block in blocks]
    anchor_local = _attend_causally(tools, anchor, scale)
    output = empty_tokens_first(query)
    anchor_output, *block_outputs = output.split(lengths, dim=2)
    anchor_arrives()
    _merge_with(tools, anchor[0], anchor_local, passed.first(start), scale, anchor_output)
    kept_arrives()
    seen = [plan.num_seen(host) for host in state.hosts]
    keys, values = passed.first(max(seen))
    for block, local, num_seen, block_output in zip(blocks, blocks_local, seen, block_outputs, strict=True):
        others = keys[:, :, :num_seen], values[:, :, :num_seen]
        _merge_with(tools, block[0], local, others, scale, block_output)
    state.finish_layer(layer_idx)
    return output


def _store(state: PrefillState, layer_idx: int, keys: Tensor, values: Tensor) -> None:
    """Cache the keys and values of this rank's blocks, if there is a token in them."""
    if keys.shape[2]:
        state.cache.layer(layer_idx).store_block(keys, values)


def _attend_causally(tools: Tools, states: States, scale: float) -> tuple[Tensor, Tensor] | None:
    query, key, value = states
    if query.shape[2] == 0:
        return None
    return tools.kernels.prefill(query, key, value, True, scale)


def _merge_with(
    tools: Tools,
    query: Tensor,
    local: tuple[Tensor, Tensor] | None,
    others: tuple[Tensor, Tensor],
    scale: float,
    output: Tensor,
) -> None:
    """Merge the local causal part with unmasked attention to the keys and values of others, into `output`."""
    if local is None:
        return
    keys, values = others
    if keys.shape[2] == 0:
        output.copy_(local[0])
    else:
        tools.merge_two(*local, *tools.kernels.prefill(query, keys, values, False, scale), output)


def _send_anchor(tools: Tools, state: PrefillState, passed: PassedStates, anchor: States) -> Arrival:
    """Start the exchange of anchor shares; only the first round has any."""
    plan, group = state.plan, tools.group
    assert tools.compressor is not None
    if state.round_index > 0 or plan.anchor_length == 0:
        return lambda: None
    query, key, value = anchor
    if tools.compressor.needs_anchor_queries:
        passed.anchor_queries = _gather_anchor_queries(tools, state, query)
    if isinstance(passed, OwnStates):
        passed.keep_anchor(key, value)
        return lambda: None
    assert isinstance(passed, SentStates)
    if not plan.shard_anchor:
        passed.place_pair(0, key, value)
        return lambda: None
    shares = split_evenly(plan.anchor_length, group.world_size)
    longest = max(stop - start for start, stop in shares)
    message = _empty_messages(key, 1, longest)[0]
    place_pair(key, value, message[:, :, : key.shape[2]])
    pending = group.start_all_gather(message)

    return lambda: passed.place_all(shares, pending.wait())


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


def _send_kept(
    tools: Tools, state: PrefillState, passed: PassedStates, layer_idx: int, blocks: Sequence[States], scale: float
) -> Arrival:
    """Compress this rank's blocks and start the exchange of what the round's hosts keep.

    What was projected of the blocks is let go of on the way out: attention needs the memory.
    """
    plan, group = state.plan, tools.group
    assert tools.compressor is not None
    served = plan.rounds[state.round_index]
    longest = max(_sent_length(plan, host) for hosts in served for host in hosts)
    if longest == 0:
        return lambda: None
    messages = None if isinstance(passed, OwnStates) else _empty_messages(blocks[0][1], len(blocks), longest)
    of_hosts = zip(state.hosts, blocks, state.take_projections(), strict=True)
    for index, (host, (query, key, value), projections) in enumerate(of_hosts):
        if not plan.is_passed_on(host):
            continue
        states = BlockStates(
            queries=query,
            keys=key,
            values=value,
            start=plan.blocks[host][0],
            layer_idx=layer_idx,
            scale=scale,
            anchor_queries=passed.anchor_queries,
            projections=_joined(projections) if plan.is_scored(host) else None,
            fused=tools.fused,
        )
        count, num_eligible = plan.kept_lengths[host], plan.num_eligible(host)
        if messages is None:
            assert isinstance(passed, OwnStates)
            passed.keep(tools.compressor.choose(states, count, num_eligible), states.start)
        else:
            tools.compressor.compress(states, count, num_eligible, messages[index, :, :, :count])
    if messages is None:
        return lambda: None
    spans = [[_sent_span(plan, hosts[index]) for hosts in served] for index in range(len(blocks))]
    pending = group.start_all_gather(messages)

    def arrive() -> None:
        assert isinstance(passed, SentStates)
        everyone = pending.wait()
        for index, of_ranks in enumerate(spans):
            passed.place_all(of_ranks, everyone[:, index])

    return arrive


def _joined(projections: tuple[Tensor, ...] | None) -> Tensor | None:
    """Return what was projected of one block as one tensor, (1, block_tokens, channels)."""
    if projections is None or len(projections) == 1:
        return None if projections is None else projections[0]
    return torch.cat(projections, dim=-1)


def _sent_length(plan: Plan, host: int) -> int:
    return plan.kept_lengths[host] if plan.is_passed_on(host) else 0


def _sent_span(plan: Plan, host: int) -> tuple[int, int]:
    """Return where what the host passes on lies among all that blocks see besides their own."""
    start = plan.anchor_length + plan.kept_offsets[host]
    return start, start + _sent_length(plan, host)


def _empty_messages(like: Tensor, number: int, length: int) -> Tensor:
    """Return room for so many messages of keys and values, (number, 2, kv_heads, length, head_dim), zeros."""
    return like.new_zeros((number, 2, like.shape[1], length, like.shape[3]))
