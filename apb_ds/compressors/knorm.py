"""Keep keys of small norm (arXiv 2406.11430)."""

from torch import Tensor

from apb_ds.compressors.base import BlockStates, Compressor, register_compressor


@register_compressor("knorm")
class KnormCompressor(Compressor):
    """Score -||k||: keys of small norm get more attention."""

    def score(self, block: BlockStates) -> Tensor:
        return -block.keys[0].float().norm(dim=-1)
