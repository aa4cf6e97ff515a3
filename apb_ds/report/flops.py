"""Floating-point operations of a prefill, counted from a model's sizes and a `Plan`. Pure functions, no torch.

Every multiply-add of a matrix product counts as two: in linear layers, in attention (queries with keys, weights with
values) and in compressors that score by products. Causal attention counts the pairs of tokens that see each other,
whatever else a kernel computes. Norms, activations, softmax, rotations and merging are not counted.

The counts are of the engine's work: a prefill ends with the last layer's keys and values, so that layer computes only
the projections before its attention.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from apb_ds.plan import Plan
from apb_ds.utils.sizes import AttentionSizes, read_attention_sizes

SIZE_NAMES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class ModelSizes(AttentionSizes):
    """Sizes of a decoder whose layers are attention and a gated MLP (gate, up and down).

    `windows` has the window of each layer in tokens, None where it sees all; empty if every layer does.
    """

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    windows: tuple[int | None, ...] = ()

    @classmethod
    def from_config(cls, config: Any, windows: tuple[int | None, ...] = ()) -> ModelSizes | None:
        """Read the sizes from a transformers config; None if it lacks one, or has several of one."""
        found: list[Any] = [getattr(config, name, None) for name in SIZE_NAMES]
        if not all(isinstance(size, int) and size > 0 for size in found):
            return None
        others = dict(zip(SIZE_NAMES[2:], found[2:], strict=True))
        return cls(**vars(read_attention_sizes(config)), **others, windows=windows)

    @property
    def before_attention(self) -> int:
        """Weights of one layer's projections to queries, keys and values."""
        return self.hidden_size * self.qkv_size

    @property
    def after_attention(self) -> int:
        """Weights of one layer's output projection and MLP."""
        return self.heads * self.head_dim * self.hidden_size + 3 * self.hidden_size * self.intermediate_size

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' linear layers, without the language model head."""
        return self.num_layers * (self.before_attention + self.after_attention)

    @property
    def per_token(self) -> int:
        """Operations of the linear layers on one token in a prefill."""
        layers = self.num_layers
        return 2 * (layers * self.before_attention + (layers - 1) * self.after_attention)

    @property
    def num_full(self) -> int:
        """How many layers attend to all tokens in a prefill, in which the last layer does not attend."""
        return self.num_layers - 1 - len(self.bounds)

    @property
    def bounds(self) -> list[int]:
        """The windows of the other layers that attend in a prefill."""
        return [window for window in self.windows[:-1] if window is not None]

    @property
    def per_pair(self) -> int:
        """Operations of attention for one pair of query and key, over the layers that attend to all tokens."""
        return self.num_full * self.per_pair_of_layer

    @property
    def per_pair_of_layer(self) -> int:
        return 4 * self.heads * self.head_dim


@dataclass(frozen=True)
class RankFlops:
    """Operations of one rank. All fields but the last make up its prefill.

    Attributes
    ----------
    document_linear : linear layers on the document's tokens (and ulysses' padding)
    anchor_linear : linear layers on the anchor's tokens
    block_attention : attention within blocks; all attention of ring and ulysses
    anchor_attention : attention of the anchor's tokens to each other
    to_anchor, to_passed : attention of the blocks' tokens to the anchor and to the passing blocks
    window_attention : all attention of layers with windows
    scoring : the compressor's matrix products
    query : all layers and the head, for the query's pass over the cache
    """

    document_linear: int = 0
    anchor_linear: int = 0
    block_attention: int = 0
    anchor_attention: int = 0
    to_anchor: int = 0
    to_passed: int = 0
    window_attention: int = 0
    scoring: int = 0
    query: int = 0

    @property
    def prefill(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)) - self.query


@dataclass(frozen=True)
class PrefillFlops:
    """Operations of one prefill, by rank; `total` and `slowest_rank` exclude the query's pass."""

    ranks: tuple[RankFlops, ...]

    @property
    def total(self) -> int:
        return sum(rank.prefill for rank in self.ranks)

    @property
    def slowest_rank(self) -> int:
        return max(rank.prefill for rank in self.ranks)

    def part(self, name: str) -> int:
        """Return a part's operations, a field of `RankFlops`, over all ranks."""
        return sum(getattr(rank, name) for rank in self.ranks)

    def as_dict(self) -> dict[str, Any]:
        """Return totals and parts, for JSON."""
        parts = {field.name: self.part(field.name) for field in fields(RankFlops)}
        query = parts.pop("query")
        return {"total": self.total, "slowest_rank": self.slowest_rank, "query": query, "parts": parts}


def count_flops(
    sizes: ModelSizes,
    plan: Plan,
    *,
    compressor: Any = None,
    query_length: int = 0,
    num_logits: int = 1,
    weight_ranks: int = 1,
) -> PrefillFlops:
    """Count the operations of one prefill.

    Parameters
    ----------
    compressor : Compressor, optional
    query_length : tokens of the query asked after the prefill; 0 for none
    num_logits : how many of its tokens get logits
    weight_ranks : that hold a copy of the weights together, and compute the query's products in parts
    """
    count = {"ring": _count_ring, "ulysses": _count_ulysses}.get(plan.method, _count_blocks)
    ranks = []
    for rank in range(plan.world_size):
        parts = count(sizes, plan, rank)
        if count is _count_blocks and compressor is not None:
            scored = [plan.block_length(host) for host in plan.hosts_of(rank) if plan.is_scored(host)]
            products = (
                compressor.score_products(tokens, plan.anchor_query_length, sizes.heads, sizes.head_dim)
                for tokens in scored
            )
            parts["scoring"] = 2 * sizes.num_full * sum(products)
        pairs = sum(_window_pairs(plan, rank, window) for window in sizes.bounds)
        parts["window_attention"] = sizes.per_pair_of_layer * pairs
        parts["query"] = _count_query(sizes, plan, rank, query_length, num_logits, weight_ranks)
        ranks.append(RankFlops(**parts))
    return PrefillFlops(tuple(ranks))


def _causal_pairs(num_tokens: int) -> int:
    return num_tokens * (num_tokens + 1) // 2


def _pairs_until(position: int, window: int) -> int:
    """Return how many pairs the tokens before a position see within a window, whose first tokens see fewer."""
    return _causal_pairs(min(position, window)) + max(0, position - window) * window


def _window_pairs(plan: Plan, rank: int, window: int) -> int:
    """Count the pairs of one layer with a window: of the rank's share of the anchor, and of its blocks."""
    spans = [plan.anchor_share(rank, 0), *(plan.blocks[host] for host in plan.hosts_of(rank))]
    return sum(_pairs_until(stop, window) - _pairs_until(start, window) for start, stop in spans)


def _count_blocks(sizes: ModelSizes, plan: Plan, rank: int) -> dict[str, int]:
    """Count dense, star and apb: each host's block sees itself, the anchor and what earlier hosts pass."""
    start, stop = plan.anchor_share(rank, 0)
    share = stop - start
    hosts = plan.hosts_of(rank)
    lengths = {host: plan.block_length(host) for host in hosts}
    return {
        "document_linear": sizes.per_token * sum(lengths.values()),
        "anchor_linear": sizes.per_token * share,
        "block_attention": sizes.per_pair * sum(map(_causal_pairs, lengths.values())),
        "anchor_attention": sizes.per_pair * (_causal_pairs(share) + share * start),
        "to_anchor": sizes.per_pair * plan.anchor_length * sum(lengths[host] for host in hosts if host > 0),
        "to_passed": sizes.per_pair * sum(lengths[host] * plan.kept_offsets[host] for host in hosts),
    }


def _count_ring(sizes: ModelSizes, plan: Plan, rank: int) -> dict[str, int]:
    """Count ring: both blocks see an earlier rank's early block; only the late one sees a later rank's two blocks."""
    early, late = (plan.block_length(host) for host in plan.served(rank, 0))
    pairs = _causal_pairs(early + late)
    for source in range(plan.world_size):
        of_source = [plan.block_length(host) for host in plan.served(source, 0)]
        if source < rank:
            pairs += (early + late) * of_source[0]
        elif source > rank:
            pairs += late * sum(of_source)
    return {"document_linear": sizes.per_token * (early + late), "block_attention": sizes.per_pair * pairs}


def _count_ulysses(sizes: ModelSizes, plan: Plan, rank: int) -> dict[str, int]:
    """Count ulysses: every rank attends over all tokens, padding included, with its share of the heads."""
    num_tokens = plan.num_forward_tokens(rank, 0)
    pairs = _causal_pairs(num_tokens * plan.world_size)
    return {
        "document_linear": sizes.per_token * num_tokens,
        "block_attention": sizes.per_pair * pairs // plan.world_size,
    }


def _count_query(sizes: ModelSizes, plan: Plan, rank: int, num_query: int, num_logits: int, weight_ranks: int) -> int:
    """Count the query's pass on one rank: all of the query over the rank's shard; on the last rank also over itself."""
    if num_query == 0:
        return 0
    pairs = num_query * plan.shard_length(rank)
    if rank == plan.world_size - 1:
        pairs += _causal_pairs(num_query)
    bounds = [window for window in sizes.windows if window is not None]
    pairs *= sizes.num_layers - len(bounds)
    num_all = plan.num_tokens + num_query
    pairs += sum(_pairs_until(num_all, window) - _pairs_until(plan.num_tokens, window) for window in bounds)
    head = min(num_query, num_logits) * sizes.hidden_size * sizes.vocab_size
    return 2 * (num_query * sizes.linear_weights + head) // weight_ranks + sizes.per_pair_of_layer * pairs
