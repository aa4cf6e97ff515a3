"""Keep the end of each block."""

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, register_compressor


@register_compressor("recent")
class RecentCompressor(Compressor):
    """Score the position from the block's start, which is exact in float32."""

    def score(self, block: BlockStates) -> Tensor:
        positions = torch.arange(block.num_tokens, dtype=torch.float32, device=block.keys.device)
        return positions.expand(block.kv_heads, -1)
