"""One copy of a model's weights over the ranks: gathered layer by layer in a prefill, used in place by all else.

`cut` says which layers are cut, and cuts them while they are loaded; `layers` holds the layer that has some rows of its
weight, `gatherer` brings whole layers together just in time, and `shards` puts them into a model.
"""

from __future__ import annotations

from apb_ds.weights.shards import ShardedWeights, check_shard_ranks, check_weights_for, is_sharded

__all__ = ["ShardedWeights", "check_shard_ranks", "check_weights_for", "is_sharded"]
