"""Keep what the block's last tokens attend to (as SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, max_pool, mean_attention, register_compressor


@register_compressor("window")
@dataclass(frozen=True)
class WindowCompressor(Compressor):
    """Score the causal attention of the last `window` queries, averaged over queries and the group's heads."""

    window: int = 32

    def score(self, block: BlockStates) -> Tensor:
        return max_pool(window_mass(block, self.window))

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        return min(self.window, block_tokens) * block_tokens * heads * head_dim


def window_mass(block: BlockStates, window: int) -> Tensor:
    """Return each token's share of the last `window` queries' attention, (kv_heads, block_tokens), float32."""
    observers = min(window, block.num_tokens)
    num_hidden = torch.arange(observers - 1, -1, -1, device=block.keys.device)
    queries = block.queries[:, :, -observers:]
    return mean_attention(queries, block.keys, block.scale, num_hidden, block.fused).mean(dim=1)
