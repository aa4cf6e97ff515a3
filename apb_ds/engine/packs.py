"""Run a pack through an engine's model: one forward for new tokens of several sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apb_ds.engine.validation import QueryRequest
from apb_ds.hf.interface import PassingCache, packed_attention
from apb_ds.hf.overrides import without_overrides
from apb_ds.methods.packed import Member, Pack
from apb_ds.ops.memory import explain_out_of_memory

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine

# Tokens of queries that share a forward. A longer query runs alone, in parts of so many while others are answered.
QUERY_FORWARD_TOKENS = 2048
FEWER_SEQUENCES = "What helps: fewer sequences at a time (max_sequences), fewer new tokens, or more ranks."


def run_pack(engine: APBEngine, members: Sequence[Member], *, with_all_logits: bool = False) -> Tensor:
    """Feed the new tokens of several sequences in one forward, and count them.

    Parameters
    ----------
    members : those of one prefix next to each other

    Returns
    -------
    (members, vocab), float32: the logits of each one's last token; or (tokens, vocab), of all
    """
    for one in members:
        engine.pool.make_room(one.suffix, len(one.fed))
    with explain_out_of_memory(f"feeding {sum(len(one.fed) for one in members)} tokens", FEWER_SEQUENCES):
        logits = None
        graphs = engine._acceleration.packed
        if graphs is not None and not with_all_logits and all(len(one.fed) == 1 for one in members):
            logits = graphs.run(engine, members)
        if logits is None:
            logits = _run(engine, members, with_all_logits)
    for one in members:
        engine.pool.count(one.suffix, len(one.fed))
    return logits


def _run(engine: APBEngine, members: Sequence[Member], with_all_logits: bool) -> Tensor:
    pack = Pack(engine.layers, engine.pool, members, engine.device)
    kept: int | Tensor = 0  # all
    if not with_all_logits and not pack.is_step:
        kept = torch.tensor([span.stop - 1 for span in pack.spans], device=engine.device)
    return run_forward(engine, pack, kept)


def run_forward(engine: APBEngine, pack: Pack, kept: int | Tensor = 0) -> Tensor:
    """Run the model on a pack; nothing is counted.

    Parameters
    ----------
    kept : as transformers' ``logits_to_keep``: indices of tokens, 0 for all

    Returns
    -------
    (tokens kept, vocab), float32
    """
    pack.read_numbers()
    reaches = [(len(one.fed), one.reach) for one in pack.members]
    with (
        without_overrides(),  # of a prefill around it, such as linear layers for many tokens
        engine._weights_in_place(),
        engine._acceleration.in_decoding(),
        packed_attention(engine.module, engine.attention, pack, reaches),
    ):
        output = engine.module(
            input_ids=pack.inputs[:1],
            position_ids=pack.inputs[1:],
            past_key_values=PassingCache(pack.store),
            use_cache=True,
            logits_to_keep=kept,
            return_dict=True,
        )
    logits: Tensor = output.logits[0].float()
    return logits


def query_logits_together(engine: APBEngine, requests: Sequence[QueryRequest]) -> list[Tensor]:
    """Return the logits of several queries' tokens, (1, q, vocab) each, float32, as this rank computed them."""
    found: list[Any] = [None] * len(requests)
    indices = ordered_by_prefix(range(len(requests)), lambda index: id(requests[index].source))
    for indices_of_forward in in_forwards(indices, lambda index: _num_fed(requests[index])):
        members = []
        try:
            for index in indices_of_forward:
                members.append(_member(engine, requests[index]))
            logits = run_pack(engine, members, with_all_logits=True)
        finally:
            for member in members:
                engine.pool.free(member.suffix)
        parts = logits.split([len(member.fed) for member in members])
        for index, part in zip(indices_of_forward, parts, strict=True):
            found[index] = part[-requests[index].ids.shape[1] :].unsqueeze(0).contiguous()
    return found


def _num_fed(request: QueryRequest) -> int:
    source: Any = request.source
    return int(request.ids.shape[1] + source.num_tokens - source.num_cached)


def _member(engine: APBEngine, request: QueryRequest) -> Member:
    source: Any = request.source
    owed = source.token_ids[:, source.num_cached :]
    fed = torch.cat([owed, request.ids], dim=-1)[0].tolist()
    suffix = engine.pool.new([len(fed)], getattr(source, "suffix", None))
    return Member(source.prefix(), suffix, fed, source.max_positions)


def ordered_by_prefix(items: Iterable[Any], prefix: Any) -> list[Any]:
    """Return items in a pack's order: those of one prefix together, then by when they came; the same on every rank."""
    items = list(items)
    first: dict[Any, int] = {}
    for place, item in enumerate(items):
        first.setdefault(prefix(item), place)
    return sorted(items, key=lambda item: first[prefix(item)])


def cut_query(num_tokens: int) -> list[int]:
    """Return how many tokens each forward of a query feeds while others are answered."""
    whole, rest = divmod(num_tokens, QUERY_FORWARD_TOKENS)
    return [QUERY_FORWARD_TOKENS] * whole + ([rest] if rest else [])


def in_forwards(items: Iterable[Any], length: Any) -> list[list[Any]]:
    """Split items into lists of at most `QUERY_FORWARD_TOKENS` tokens each, in order."""
    forwards: list[list[Any]] = []
    total = 0
    for item in items:
        if not forwards or total + length(item) > QUERY_FORWARD_TOKENS:
            forwards.append([])
            total = 0
        forwards[-1].append(item)
        total += length(item)
    return forwards
