"""The sizes of a decoder's attention, from its transformers config, and how one of its layers attends."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends.

    Attributes
    ----------
    heads, kv_heads : of what its attention function gets
    head_dim : channels of a head's queries and keys
    value_dim : channels of a head's values
    window : how many tokens a token sees, itself included; None for all before it
    softcap : bound of the attention logits; None without
    stores : whether it has keys and values in the cache; if not, it attends to another layer's
    stores_attended : whether what it stores is what it attends to; latent attention stores latents
    latents : heads and channels of the keys and of the values that it stores, where it does not attend to these
    dtype : of what it stores, a torch.dtype; None for torch's default
    stage : of a pipeline, from 0, that computes the layer
    is_here : whether that is this rank's
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    stores: bool = True
    stores_attended: bool = True
    latents: tuple[tuple[int, int], tuple[int, int]] | None = None
    dtype: Any = None
    stage: int = 0
    is_here: bool = True

    @property
    def stores_here(self) -> bool:
        """Whether it has keys and values in this rank's cache."""
        return self.stores and self.is_here

    @property
    def stored_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and channels of the keys and of the values that it stores."""
        return self.latents or ((self.kv_heads, self.head_dim), (self.kv_heads, self.value_dim))


def num_prefilled(layers: Sequence[LayerAttention]) -> int:
    """Return how many layers a prefill computes: it ends with the last one that stores anything."""
    return max(layer_idx for layer_idx, layer in enumerate(layers) if layer.stores) + 1


def read_attention_sizes(config: Any) -> AttentionSizes:
    """Read the sizes from a transformers config.

    Raises
    ------
    ValueError
        If they differ between layers.
    """
    try:
        heads = config.num_attention_heads
        return AttentionSizes(
            num_layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
    except RuntimeError as error:  # transformers' way to say so
        raise ValueError(f"the sizes of a {config.model_type} model's attention differ between its layers.") from error
