"""A prefilled document, from which queries and conversations are answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.cache import ShardedCache
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan


@dataclass
class Context:
    """A document in the sharded cache of one engine, made by `APBEngine.prefill`.

    Attributes
    ----------
    plan : how the document was split
    cache : this rank's shard
    token_ids : (1, tokens), int64, on the model's device: the document and every turn kept since. The last
        token of a generated turn is not in the cache yet; the next forward feeds it first.
    max_positions : positions that the rotary frequencies were chosen for
    prefill_s : seconds of the prefill on this rank
    bytes_sent : bytes that this rank sent to others during the prefill
    model, group : the engine's that made it
    key : digest of settings and tokens, the same on every rank; empty for a group of one rank
    """

    plan: Plan
    cache: ShardedCache = field(repr=False)
    token_ids: Tensor = field(repr=False)
    max_positions: int
    prefill_s: float
    bytes_sent: int
    model: PreTrainedModel = field(repr=False)
    group: SequenceGroup = field(repr=False)
    key: str = ""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Context cannot be pickled or saved with torch.save: it holds the engine's model and process group. "
            "Prefill the document again instead."
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the document and the turns kept since."""
        return int(self.token_ids.shape[1])

    @property
    def num_cached(self) -> int:
        """Tokens in the cache, over all ranks."""
        return self.cache.get_seq_length()
