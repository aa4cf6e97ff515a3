"""Keep keys that differ from the block's mean direction (KeyDiff, arXiv 2504.15364)."""

from torch import Tensor
from torch.nn import functional as F

from apb_ds.compressors.base import BlockStates, Compressor, register_compressor


@register_compressor("keydiff")
class KeydiffCompressor(Compressor):
    """Score the negative cosine between a key and the mean of the block's normalised keys."""

    def score(self, block: BlockStates) -> Tensor:
        keys = block.keys[0].float()
        mean_direction = F.normalize(keys, dim=-1).mean(dim=1, keepdim=True)
        return -F.cosine_similarity(keys, mean_direction, dim=-1)
