"""Keep what the block's last tokens attend to (as SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.compressors.base import (
    BlockStates,
    Compressor,
    attention_products,
    max_pool,
    register_compressor,
    softmax_of_visible,
)
from apb_ds.ops.compiled import compiled_if


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
    products = attention_products(block.queries[:, :, -observers:], block.keys)
    return compiled_if(_mean_mass, block.fused)(products, num_hidden, block.scale)


def _mean_mass(products: Tensor, num_hidden: Tensor, scale: float) -> Tensor:
    """Return each key's attention, (kv_heads, tokens), averaged over the group's heads and the queries."""
    return softmax_of_visible(products * scale, num_hidden).mean(dim=(1, 2))
