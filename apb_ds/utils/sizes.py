"""The sizes of a decoder's attention, from its transformers config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionSizes:
    """Layers, query heads, KV heads, and channels of each head."""

    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def qkv_size(self) -> int:
        """Channels of a token's queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def read_attention_sizes(config: Any) -> AttentionSizes:
    heads = config.num_attention_heads
    return AttentionSizes(
        num_layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
