"""Keep what the block's last tokens attend to (the idea of SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, attention_mass, max_pool, register_compressor


@register_compressor("window")
@dataclass(frozen=True)
class WindowCompressor(Compressor):
    """Causal attention of the last `window` queries over the block, averaged over queries and the group's heads."""

    window: int = 32

    def score(self, block: BlockStates) -> Tensor:
        observers = min(self.window, block.num_tokens)
        num_hidden = torch.arange(observers - 1, -1, -1, device=block.keys.device)
        mass = attention_mass(block.queries[:, :, -observers:], block.keys, block.scale, num_hidden)
        return max_pool(mass.mean(dim=(1, 2)))

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        return min(self.window, block_tokens) * block_tokens * heads * head_dim
