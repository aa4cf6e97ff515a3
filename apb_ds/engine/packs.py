"""Run a pack through an engine's model: one forward for new tokens of several sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apb_ds.engine.validation import QueryRequest
from apb_ds.hf.interface import PassingCache, packed_attention
from apb_ds.hf.overrides import without_overrides
from apb_ds.hf.stages import Stage, run_model
from apb_ds.methods.packed import Member, Pack
from apb_ds.ops.memory import explain_out_of_memory
from apb_ds.plan import split_evenly

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
    packs = [Pack(engine.layers, engine.pool, part, engine.device) for part in _parts(members, engine.stage)]
    kept: list[int | Tensor] = [0] * len(packs)  # all
    if not with_all_logits and not all(len(one.fed) == 1 for one in members):
        kept = [torch.tensor([span.stop - 1 for span in pack.spans], device=engine.device) for pack in packs]
    if engine.stage is None:
        return run_forward(engine, packs[0], kept[0])
    lengths = [pack.inputs.shape[1] for pack in packs]
    with engine.stage.connected(engine.stage.pipeline.tokens, lengths, engine.device):
        found = [_forward(engine, pack, of_pack) for pack, of_pack in zip(packs, kept, strict=True)]
    num_kept = sum(lengths) if with_all_logits else len(members)
    return engine.stage.bring_back(found, num_kept, engine.module)[0]


def _parts(members: Sequence[Member], stage: Stage | None) -> list[Sequence[Member]]:
    """Split queries into as many forwards as there are stages: while one stage runs the first, another runs the next.

    A step of one token each is not split: a forward of few tokens takes as long as one of half as many.
    """
    if stage is None or all(len(one.fed) == 1 for one in members):
        return [members]
    spans = split_evenly(len(members), min(len(members), stage.pipeline.num_stages))
    return [members[start:stop] for start, stop in spans]


def run_forward(engine: APBEngine, pack: Pack, kept: int | Tensor = 0) -> Tensor:
    """Run the model, which is whole, on a pack; nothing is counted.

    Parameters
    ----------
    kept : as transformers' ``logits_to_keep``: indices of tokens, 0 for all

    Returns
    -------
    (tokens kept, vocab), float32
    """
    logits: Any = _forward(engine, pack, kept)
    return logits[0].float()


def _forward(engine: APBEngine, pack: Pack, kept: int | Tensor) -> Tensor | None:
    """Run what this rank has of the model on a pack; return the logits, (1, tokens kept, vocab), if it has its end."""
    pack.read_numbers()
    reaches = [(len(one.fed), one.reach) for one in pack.members]
    with (
        without_overrides(),  # of a prefill around it, such as linear layers for many tokens
        engine._weights_in_place(),
        engine._acceleration.in_decoding(),
        packed_attention(engine.module, engine.attention, pack, reaches),
    ):
        return run_model(
            engine.module,
            input_ids=pack.inputs[:1],
            position_ids=pack.inputs[1:],
            past_key_values=PassingCache(pack.store),
            use_cache=True,
            logits_to_keep=kept,
        )


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
