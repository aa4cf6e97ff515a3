"""Keep what the query attends to. It is in the anchor, so every host has it."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, attention_mass, max_pool, register_compressor


@register_compressor("query")
class QueryCompressor(Compressor):
    """Attention of the anchor's query tokens over the block: mean over tokens, maximum over the group's heads."""

    needs_anchor_queries = True

    def score(self, block: BlockStates) -> Tensor:
        if block.anchor_queries is None:
            raise ValueError("compressor='query' needs the anchor's query vectors; set BlockStates.anchor_queries.")
        group = block.queries.shape[1] // block.kv_heads
        scores = []
        for head in range(block.kv_heads):  # one at a time: a long query over a long block makes a large matrix
            queries = block.anchor_queries[:, head * group : (head + 1) * group]
            mass = attention_mass(queries, block.keys[:, head : head + 1], block.scale)
            scores.append(mass.mean(dim=2).amax(dim=1))
        return max_pool(torch.cat(scores))

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        return query_tokens * block_tokens * heads * head_dim
