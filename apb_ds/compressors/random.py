"""Keep random tokens: the baseline for other compressors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, register_compressor
from apb_ds.config import BlockSettings

MASK_32 = 0xFFFFFFFF


@register_compressor("random")
@dataclass(frozen=True)
class RandomCompressor(Compressor):
    """Score a hash of (seed, layer, KV head, document position), independent of the rank and the order of calls."""

    seed: int = 0

    @classmethod
    def from_settings(cls, settings: BlockSettings) -> RandomCompressor:
        return cls(seed=settings.seed)

    def score(self, block: BlockStates) -> Tensor:
        device = block.keys.device
        positions = torch.arange(block.start, block.start + block.num_tokens, device=device)
        heads = torch.arange(block.kv_heads, device=device).unsqueeze(-1)
        state = torch.full((1, 1), (self.seed ^ (self.seed >> 32)) & MASK_32, device=device)
        for part in (torch.full_like(state, block.layer_idx), heads, positions):
            state = mix(state ^ mix(part + 0x9E3779B9))
        return (state >> 8).float() / 2**24


def mix(values: Tensor) -> Tensor:
    """Map 32-bit integers (in int64) one-to-one, such that every input bit affects every output bit.

    The multipliers are below 2**31, so that products fit into int64.
    """
    values = values & MASK_32
    for multiplier in (0x7FEB352D, 0x46A1B9B3):
        values = ((values ^ (values >> 16)) * multiplier) & MASK_32
    return values ^ (values >> 15)
