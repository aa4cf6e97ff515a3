"""One copy of a model's weights over the ranks: gathered layer by layer in a prefill, used in place by all else.

`layers` holds the layer that has some rows of its weight, `gatherer` brings whole layers together just in time, and
`shards` cuts a model.
"""

from __future__ import annotations

from apb_ds.weights.shards import ShardedWeights, check_shardable, check_whole

__all__ = ["ShardedWeights", "check_shardable", "check_whole"]
