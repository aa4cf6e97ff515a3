"""The judge: APB by one explicit mask over [anchor | document | query], one process, no cache, no blocks.

The real model's own layers run token by token over the concatenated sequence; only attention is computed here, in
float64, under a boolean mask per layer and KV head that says who sees whom. Written to be obviously right, not fast,
and without anything from the package under test, so that a mistake there is not repeated here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tests.reference_scores import SCORERS, ScoreInput, Scorer

_NAME = "explicit_mask_reference"

STAR: dict[str, Any] = {"anchor_length": "block", "passing_length": 0, "query_in_anchor": False}

MaskEdit = Callable[[int, Tensor, "Layout"], Tensor]


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True)
class Settings:
    """What a request resolves to. Lengths in tokens; `embedded_length` is the part of the anchor that is the query."""

    document_length: int
    hosts: int
    anchor_length: int
    passing_length: int
    embedded_length: int
    query_position: int
    exact: bool
    compressor: str
    seed: int

    def block(self, host: int) -> range:
        """Document positions of the host's block."""
        n, hosts = self.document_length, self.hosts
        return range(host * n // hosts, (host + 1) * n // hosts)

    def is_eligible(self, position: int) -> bool:
        """Whether the anchor does not already hold the document token at `position`."""
        return position >= self.anchor_length - self.embedded_length


def resolve_settings(
    document_length: int,
    query_length: int | None,
    *,
    hosts: int = 8,
    anchor_length: int | str | None = None,
    passing_length: int | None = None,
    compression_ratio: float | None = None,
    compressor: str = "window",
    query_in_anchor: bool = True,
    query_position: int = 1,
    seed: int = 0,
) -> Settings:
    """Apply the rules for settings in their order; `query_length` is None where prefill is given no query."""
    if passing_length is not None and compression_ratio is not None:
        raise ValueError("passing_length and compression_ratio are both given")
    if compression_ratio is not None and compression_ratio < 1:
        raise ValueError(f"compression_ratio={compression_ratio} is less than 1")
    largest_block = _ceil_div(document_length, hosts)
    embedded = query_length if query_in_anchor and query_length is not None else 0
    reserved = query_position + embedded if embedded else 0
    if anchor_length == "block":
        anchor = document_length // hosts
    elif anchor_length is None:
        anchor = max(min(_ceil_div(largest_block, 4), 8192), reserved)
    else:
        anchor = int(anchor_length)
    if anchor == 0:
        embedded = 0
    if hosts == 1 or anchor > largest_block:
        return Settings(document_length, hosts, 0, document_length, 0, query_position, True, compressor, seed)
    if embedded and anchor < query_position + embedded:
        raise ValueError(f"an anchor of {anchor} cannot hold {query_position} + {embedded} tokens")
    if passing_length is None:
        passing_length = math.ceil(largest_block / (8 if compression_ratio is None else compression_ratio))
    if compressor == "query" and not embedded:
        raise ValueError("the query compressor needs the query in the anchor")
    return Settings(document_length, hosts, anchor, passing_length, embedded, query_position, False, compressor, seed)


@dataclass(frozen=True)
class Layout:
    """Where the three parts of the concatenated sequence are; `position[i]` is the rotary position of token i."""

    settings: Settings
    ids: Tensor
    position: Tensor
    document_start: int
    query_start: int

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[1]

    def document_index(self, position: int) -> int:
        """Index in the sequence of the document token at `position`."""
        return self.document_start + position


def lay_out(settings: Settings, document: Tensor, tail: Tensor, embedded_query: Tensor | None) -> Layout:
    """Concatenate [anchor | document | tail]; `tail` is the query and whatever was generated after it."""
    anchor = document[:, : settings.anchor_length]
    if settings.embedded_length and embedded_query is not None:
        p, rest = settings.query_position, settings.anchor_length - settings.embedded_length
        anchor = torch.cat([document[:, :p], embedded_query, document[:, p:rest]], dim=1)
    assert anchor.shape[1] == settings.anchor_length
    n, q = document.shape[1], tail.shape[1]
    positions = [*range(anchor.shape[1]), *range(n), *range(n, n + q)]
    return Layout(
        settings,
        torch.cat([anchor, document, tail], dim=1),
        torch.tensor([positions]),
        anchor.shape[1],
        anchor.shape[1] + n,
    )


def _select(scores: Tensor, block: range, settings: Settings) -> list[int]:
    """Return the document positions kept of one block by one KV head, in document order."""
    eligible = [position for position in block if settings.is_eligible(position)]
    by_rank = sorted(eligible, key=lambda position: (-float(scores[position - block.start]), position))
    return sorted(by_rank[: settings.passing_length])


def tokens_in_window(layout: Layout, window: int) -> Tensor:
    """Return the mask of a layer with a window: anchor sees anchor, document and query what is before them."""
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for row in range(layout.num_tokens):
        first = 0 if row < layout.document_start else layout.document_start
        mask[row, max(first, row + 1 - window) : row + 1] = True
    return mask


def visible_tokens(layout: Layout, kept: list[list[int]]) -> Tensor:
    """Return the mask of one KV head, (tokens, tokens), bool: may the row's query see the column's key?

    `kept` holds, for each host, the document positions that this head passes on.
    """
    settings = layout.settings
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for row in range(layout.document_start):
        mask[row, : row + 1] = True
    for host in range(settings.hosts):
        for position in settings.block(host):
            row = layout.document_index(position)
            if settings.exact:
                mask[row, layout.document_start : row + 1] = True
                continue
            if host > 0:
                mask[row, : layout.document_start] = True
            mask[row, [layout.document_index(seen) for earlier in kept[:host] for seen in earlier]] = True
            mask[row, layout.document_index(settings.block(host).start) : row + 1] = True
    for row in range(layout.query_start, layout.num_tokens):
        mask[row, layout.document_start : row + 1] = True
    return mask


@dataclass
class ReferenceRun:
    """What one reference pass saw. `kept[layer][kv_head][host]` is a list of document positions."""

    layout: Layout
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    kept: list[list[list[list[int]]]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    largest_weight: list[Tensor] = field(default_factory=list)


class _MaskedAttention:
    """The attention function that transformers calls in every layer of a reference pass."""

    def __init__(self, run: ReferenceRun, scorer: Scorer | None, edit_mask: MaskEdit | None):
        self.run, self.edit_mask = run, edit_mask
        self.scorer = scorer
        self.projections = torch.empty(0)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layout, layer = self.run.layout, module.layer_idx
        queries, keys, values = query[0], key[0], value[0]
        window, softcap, sinks = (kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux"))
        if window is None:
            kept = self._kept_tokens(layer, queries, keys, scaling)
            masks = torch.stack([visible_tokens(layout, of_head) for of_head in kept])
        else:
            kept = []
            masks = tokens_in_window(layout, window).expand(keys.shape[0], -1, -1)
        if self.edit_mask is not None:
            masks = self.edit_mask(layer, masks, layout)
        group = queries.shape[0] // keys.shape[0]
        outputs, largest = [], []
        for head in range(queries.shape[0]):
            logits = queries[head].double() @ keys[head // group].double().T * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~masks[head // group], -torch.inf)
            if sinks is not None:  # one more key, whose value is zero
                logits = torch.cat([logits, sinks[head].double().expand(len(logits), 1)], dim=1)
            weights = logits.softmax(dim=-1)[:, : keys.shape[1]]
            outputs.append(weights @ values[head // group].double())
            largest.append(weights.amax(dim=-1))
        self.run.kept.append(kept)
        self.run.masks.append(masks)
        self.run.largest_weight.append(torch.stack(largest))
        return torch.stack(outputs, dim=1).to(query.dtype).unsqueeze(0), None

    def _kept_tokens(self, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> list[list[list[int]]]:
        layout = self.run.layout
        settings = layout.settings
        kept: list[list[list[int]]] = [[] for _ in range(keys.shape[0])]
        if settings.exact:
            return kept
        p, q = settings.query_position, settings.embedded_length
        for host in range(settings.hosts):
            block = settings.block(host)
            if len(block) == 0:
                for of_head in kept:
                    of_head.append([])
                continue
            start = layout.document_index(block.start)
            rows = slice(start, start + len(block))
            scorer = self.scorer or SCORERS[settings.compressor]
            scores = scorer(
                ScoreInput(
                    queries=queries[:, rows].float(),
                    keys=keys[:, rows].float(),
                    anchor_queries=queries[:, p : p + q].float(),
                    positions=torch.arange(block.start, block.stop),
                    scaling=scaling,
                    layer=layer,
                    seed=settings.seed,
                    projections=self.projections[rows],
                )
            )
            for head, of_head in enumerate(kept):
                of_head.append(_select(scores[head], block, settings))
        return kept


def _project(module: Any, hidden: Tensor) -> Tensor:
    """Return [q; k; v] of (tokens, hidden) states by the weights of an attention module: (tokens, channels)."""
    names = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    parts = []
    if not all(hasattr(module, name) for name in names):
        return hidden[:, :0]  # heads do not serve such a layer
    for name in names:
        linear = getattr(module, name)
        parts.append(hidden @ linear.weight.T + (0 if linear.bias is None else linear.bias))
    return torch.cat(parts, dim=-1)


def _decoder(model: PreTrainedModel) -> Any:
    """Return the part that makes hidden states of text."""
    return getattr(model.base_model, "language_model", model.base_model)


@contextlib.contextmanager
def fixed_rotary(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Rotate every forward inside as one that reaches position ``length - 1``, whatever was forwarded before."""
    rotary: Any = _decoder(model).rotary_emb
    if getattr(rotary, "rope_type", None) == "dynamic":
        rotary.register_buffer("inv_freq", rotary.original_inv_freq.clone(), persistent=False)
        rotary.max_seq_len_cached = rotary.original_max_seq_len

    def append(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        given = (*args, *kwargs.values()) if args else (kwargs["x"], kwargs["position_ids"])
        hidden, positions, *rest = given  # the rest is a kind of layers
        last = positions.new_full((*positions.shape[:-1], 1), length - 1)
        return (hidden, torch.cat([positions, last], dim=-1), *rest), {}

    def drop(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = output
        return cos[..., :-1, :], sin[..., :-1, :]

    hooks = [rotary.register_forward_pre_hook(append, with_kwargs=True), rotary.register_forward_hook(drop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _attention(model: PreTrainedModel, function: _MaskedAttention) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_NAME, function)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    config._attn_implementation = _NAME

    def project(module: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        function.projections = _project(module, hidden[0])

    hooks = [layer.self_attn.register_forward_pre_hook(project, with_kwargs=True) for layer in _decoder(model).layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)


@torch.no_grad()
def run_reference(
    model: PreTrainedModel,
    document: Tensor,
    query: Tensor,
    *,
    embedded_query: Tensor | None = None,
    embed: bool = True,
    num_new_tokens: int = 0,
    total_length: int | None = None,
    scorer: Scorer | None = None,
    edit_mask: MaskEdit | None = None,
    **settings: Any,
) -> ReferenceRun:
    """Run APB on one request and return the logits of `query`, (1, q, vocab), with what was selected on the way.

    Parameters
    ----------
    document, query : (1, n) and (1, q), int64; `query` may end in tokens that were generated
    embedded_query : the query to embed in the anchor where it is not `query` itself
    embed : False where prefill is given no query at all
    num_new_tokens : int, tokens that the request may generate beyond `query`; counts for the rotary frequencies
    total_length : int, the request's positions, where they are not n + q + num_new_tokens
    scorer : scores in place of the named compressor's
    edit_mask : changes the mask of a layer, to show that a test would notice
    settings : as `resolve_settings`
    """
    if embedded_query is None and embed:
        embedded_query = query
    embedded_length = None if embedded_query is None else embedded_query.shape[1]
    resolved = resolve_settings(document.shape[1], embedded_length, **settings)
    run = ReferenceRun(lay_out(resolved, document, query, embedded_query))
    if total_length is None:
        total_length = document.shape[1] + query.shape[1] + num_new_tokens
    attention = _MaskedAttention(run, scorer, edit_mask)
    with fixed_rotary(model, total_length), _attention(model, attention):
        run.logits = model(
            input_ids=run.layout.ids,
            position_ids=run.layout.position,
            use_cache=False,
            logits_to_keep=query.shape[1],
        ).logits
    return run


def reference_greedy(
    model: PreTrainedModel, document: Tensor, query: Tensor, num_new_tokens: int, **options: Any
) -> Tensor:
    """Return the greedy continuation, (1, num_new_tokens), by a whole reference pass for every token."""
    total = document.shape[1] + query.shape[1] + num_new_tokens
    options = {"embedded_query": query, "total_length": total, **options}
    if not options.get("embed", True):
        options["embedded_query"] = None
    tail = query
    for _ in range(num_new_tokens):
        logits = run_reference(model, document, tail, **options).logits
        tail = torch.cat([tail, logits[:, -1:].argmax(dim=-1)], dim=1)
    return tail[:, query.shape[1] :]


@torch.no_grad()
def exact_logits(model: PreTrainedModel, ids: Tensor, total_length: int | None = None) -> Tensor:
    """Return the plain model's logits of `ids`, (1, tokens, vocab), rotated for a request of `total_length`."""
    with fixed_rotary(model, total_length or ids.shape[1]):
        return model(input_ids=ids, use_cache=False).logits


def exact_greedy(model: PreTrainedModel, ids: Tensor, num_new_tokens: int) -> Tensor:
    """Return the plain model's greedy continuation of `ids`, (1, num_new_tokens), without a cache."""
    total = ids.shape[1] + num_new_tokens
    grown = ids
    for _ in range(num_new_tokens):
        grown = torch.cat([grown, exact_logits(model, grown, total)[:, -1:].argmax(dim=-1)], dim=1)
    return grown[:, ids.shape[1] :]
