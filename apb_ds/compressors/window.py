"""Keep what the block's last tokens attend to (the idea of SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.compressors.base import (
    BlockStates,
    Compressor,
    attention_logits,
    max_pool,
    register_compressor,
    softmax_of_visible,
)
from apb_ds.ops.compiled import compiled_if


@register_compressor("window")
@dataclass(frozen=True)
class WindowCompressor(Compressor):
    """Causal attention of the last `window` queries over the block, averaged over queries and the group's heads."""

    window: int = 32

    def score(self, block: BlockStates) -> Tensor:
        observers = min(self.window, block.num_tokens)
        num_hidden = torch.arange(observers - 1, -1, -1, device=block.keys.device)
        logits = attention_logits(block.queries[:, :, -observers:], block.keys, block.scale)
        return max_pool(compiled_if(_mean_mass, block.fused)(logits, num_hidden))

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        return min(self.window, block_tokens) * block_tokens * heads * head_dim


def _mean_mass(logits: Tensor, num_hidden: Tensor) -> Tensor:
    """Return the mean over a group's heads and queries, (kv_heads, tokens), of what each key gets of them."""
    return softmax_of_visible(logits, num_hidden).mean(dim=(1, 2))
