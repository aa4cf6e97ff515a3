"""Keep the tokens that trained heads and the attention of the block's last tokens favour together."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates, max_pool, register_compressor
from apb_ds.compressors.retaining_heads.compressor import RetainingHeadsCompressor
from apb_ds.compressors.window import WindowCompressor, window_mass

# Attention below this is noise, but its logarithm would outweigh all others.
SMALLEST_MASS = 1e-7


@register_compressor("heads_and_window")
class HeadsAndWindowCompressor(RetainingHeadsCompressor):
    """The heads' scores plus the logarithm of `window`'s score times the values' norms, both standardised.

    A head sees one token at a time and learns what is attended to in general; the block's last queries know the
    content. Both terms get mean 0 and variance 1 over the block, per KV head, before they are added and max-pooled.
    """

    def score(self, block: BlockStates) -> Tensor:
        mass = window_mass(block, WindowCompressor.window) * block.values[0].float().norm(dim=-1)
        return max_pool(_standardised(self.head_scores(block)) + _standardised(mass.clamp_min(SMALLEST_MASS).log()))

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        sizes = block_tokens, query_tokens, heads, head_dim
        return WindowCompressor().score_products(*sizes) + super().score_products(*sizes)


def _standardised(scores: Tensor) -> Tensor:
    """Bring each row of (kv_heads, tokens) to mean 0 and variance 1, or to zeros if it is constant."""
    deviation, mean = torch.std_mean(scores, dim=-1, correction=0, keepdim=True)
    return (scores - mean) / deviation.clamp_min(torch.finfo(scores.dtype).tiny)
