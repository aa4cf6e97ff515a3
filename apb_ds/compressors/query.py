"""Keep what the query attends to: it is in the anchor, so every host can ask it."""

from __future__ import annotations

from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, attention_mass, max_pool, register_compressor


@register_compressor("query")
class QueryCompressor(Compressor):
    """Attention of the anchor's query tokens over the block: mean over tokens, maximum over the group's heads."""

    needs_anchor_queries = True

    def score(self, block: BlockStates) -> Tensor:
        assert block.anchor_queries is not None
        mass = attention_mass(block.anchor_queries, block.keys, block.scale)
        return max_pool(mass.mean(dim=2).amax(dim=1))
