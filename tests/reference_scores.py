"""The compressors' scores once more, loop by loop: what the reference selects by. Float32, higher is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OBSERVED_QUERIES = 32
POOL = 5


@dataclass(frozen=True)
class ScoreInput:
    """One block in one layer.

    Attributes
    ----------
    queries : (heads, block_tokens, head_dim), rotated
    keys : (kv_heads, block_tokens, head_dim), rotated
    anchor_queries : (heads, q, head_dim), the query tokens embedded in the anchor, at their anchor rotation
    positions : (block_tokens,), global
    projections : (block_tokens, channels), queries, keys and values of a token one behind the other, before anything is
        done to them
    """

    queries: Tensor
    keys: Tensor
    anchor_queries: Tensor
    positions: Tensor
    scaling: float
    layer: int
    seed: int
    projections: Tensor | None = None

    @property
    def group(self) -> int:
        return self.queries.shape[0] // self.keys.shape[0]


Scorer = Callable[[ScoreInput], Tensor]


def _largest_nearby(scores: Tensor) -> Tensor:
    """Max-pool (kv_heads, tokens) over windows of five that stay within the block."""
    pooled = torch.empty_like(scores)
    reach = POOL // 2
    for token in range(scores.shape[1]):
        pooled[:, token] = scores[:, max(0, token - reach) : token + reach + 1].amax(dim=1)
    return pooled


def knorm(block: ScoreInput) -> Tensor:
    return -block.keys.square().sum(dim=-1).sqrt()


def keydiff(block: ScoreInput) -> Tensor:
    directions = block.keys / block.keys.square().sum(dim=-1, keepdim=True).sqrt()
    mean = directions.mean(dim=1, keepdim=True)
    return -(directions * mean).sum(dim=-1) / mean.square().sum(dim=-1).sqrt()


def window(block: ScoreInput) -> Tensor:
    return _largest_nearby(_mass_of_last_queries(block))


def _mass_of_last_queries(block: ScoreInput) -> Tensor:
    tokens = block.keys.shape[1]
    observers = range(tokens - min(OBSERVED_QUERIES, tokens), tokens)
    scores = torch.zeros(block.keys.shape[:2])
    for kv_head in range(block.keys.shape[0]):
        for head in range(kv_head * block.group, (kv_head + 1) * block.group):
            for observer in observers:
                logits = block.keys[kv_head, : observer + 1] @ block.queries[head, observer] * block.scaling
                scores[kv_head, : observer + 1] += logits.softmax(dim=0)
    return scores / (len(observers) * block.group)


def query(block: ScoreInput) -> Tensor:
    by_kv_head = []
    for kv_head in range(block.keys.shape[0]):
        by_head = []
        for head in range(kv_head * block.group, (kv_head + 1) * block.group):
            logits = block.anchor_queries[head] @ block.keys[kv_head].T * block.scaling
            by_head.append(logits.softmax(dim=-1).mean(dim=0))
        by_kv_head.append(torch.stack(by_head).amax(dim=0))
    return _largest_nearby(torch.stack(by_kv_head))


def recent(block: ScoreInput) -> Tensor:
    return block.positions.float().expand(block.keys.shape[0], -1)


def random(block: ScoreInput) -> Tensor:
    """A draw of this module's own per (seed, layer, KV head, position); a package's own hash goes in as `scorer`."""
    scores = torch.empty(block.keys.shape[:2])
    for kv_head in range(scores.shape[0]):
        for index, position in enumerate(block.positions.tolist()):
            name = (block.seed * 1_000_003 + block.layer) * 1_000_003 + kv_head * 10_007 + position
            scores[kv_head, index] = torch.rand((), generator=torch.Generator().manual_seed(name))
    return scores


def retaining_heads(checkpoint: dict[str, Tensor], activation: Callable[[Tensor], Tensor]) -> Scorer:
    """Return the scores of a published checkpoint: ``fc2(act(fc1([q; k; v])))``, token by token, in float64."""

    return lambda block: _largest_nearby(_of_heads(checkpoint, activation, block))


def heads_and_window(checkpoint: dict[str, Tensor], activation: Callable[[Tensor], Tensor]) -> Scorer:
    """Return the heads' scores and the logarithm of the window's mass times the norms of values, each standardised."""

    def score(block: ScoreInput) -> Tensor:
        of_heads, mass = _of_heads(checkpoint, activation, block), _mass_of_last_queries(block)
        assert block.projections is not None
        kv_heads, tokens, head_dim = block.keys.shape
        values = block.projections[:, -kv_heads * head_dim :].unflatten(1, (kv_heads, head_dim))
        scores = torch.empty(kv_heads, tokens)
        for kv_head in range(kv_heads):
            worth = mass[kv_head] * values[:, kv_head].square().sum(dim=1).sqrt()
            rows = of_heads[kv_head].double(), worth.double().clamp(min=1e-7).log()
            parts = [row - row.mean() for row in rows]
            spreads = [part.square().mean().sqrt() for part in parts]
            scores[kv_head] = sum(
                part / spread if spread > 0 else part for part, spread in zip(parts, spreads, strict=True)
            )
        return _largest_nearby(scores)

    return score


def _of_heads(checkpoint: dict[str, Tensor], activation: Callable[[Tensor], Tensor], block: ScoreInput) -> Tensor:
    assert block.projections is not None
    fc1, fc2 = (checkpoint[f"model.layers.{block.layer}.self_attn.{name}.weight"] for name in ("fc1", "fc2"))
    scores = torch.empty(block.keys.shape[:2])
    for token, states in enumerate(block.projections.double()):
        hidden = torch.stack([activation((row * states).sum()) for row in fc1.double()])
        for kv_head, row in enumerate(fc2.double()):
            scores[kv_head, token] = (row * hidden).sum()
    return scores


SCORERS: dict[str, Scorer] = {
    "knorm": knorm,
    "keydiff": keydiff,
    "window": window,
    "query": query,
    "recent": recent,
    "random": random,
}
