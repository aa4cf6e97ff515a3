"""Keep the tokens that trained heads expect later tokens to attend to."""

from __future__ import annotations

from torch import Tensor

from apb_ds.compressors.base import RETAINING_HEADS, BlockStates, Compressor, max_pool, register_compressor
from apb_ds.compressors.retaining_heads.module import RetainingHeads


@register_compressor(RETAINING_HEADS)
class RetainingHeadsCompressor(Compressor):
    """The heads' scores, max-pooled within the block.

    A head's input is the output of the layer's linear projections, biases included, before rotation and, in models
    that normalise queries and keys (Qwen3), before normalisation.

    Parameters
    ----------
    heads : on the device of the block and in its dtype; None if nothing is scored yet
    """

    needs_projections = True
    needs_heads = True

    def __init__(self, heads: RetainingHeads | None = None) -> None:
        self.heads = heads

    def score(self, block: BlockStates) -> Tensor:
        return max_pool(self.head_scores(block))

    def head_scores(self, block: BlockStates) -> Tensor:
        """Return the heads' score of each token, (kv_heads, block_tokens), float32.

        Raises
        ------
        ValueError
            Without heads, or without the block's projections.
        """
        if self.heads is None:
            raise ValueError(no_heads(self.name))
        if block.projections is None:
            raise ValueError(
                f"compressor={self.name!r} scores queries, keys and values before rotation; set "
                "PrefillState.projections before each layer's attention."
            )
        scores = self.heads(block.layer_idx, block.projections[0])
        return scores.float().transpose(0, 1)

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        return 0 if self.heads is None else block_tokens * self.heads.products_per_token


def no_heads(compressor: str) -> str:
    """Return the message for a compressor without heads."""
    return (
        f"compressor={compressor!r} needs trained heads: set retaining_heads to a .pt or .safetensors file, a "
        "directory or a hub id, or use another compressor."
    )
