"""Keep what the query attends to. It is in the anchor, so every host has it."""

from __future__ import annotations

from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, max_pool, mean_attention, register_compressor


@register_compressor("query")
class QueryCompressor(Compressor):
    """Attention of the anchor's query tokens over the block: mean over tokens, maximum over the group's heads."""

    needs_anchor_queries = True

    def score(self, block: BlockStates) -> Tensor:
        if block.anchor_queries is None or block.anchor_queries.shape[2] == 0:
            raise ValueError("compressor='query' needs the anchor's query vectors; set BlockStates.anchor_queries.")
        return max_pool(mean_attention(block.anchor_queries, block.keys, block.scale).amax(dim=1))

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        return query_tokens * block_tokens * heads * head_dim
