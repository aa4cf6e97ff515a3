"""Whether ranks keep parts of a model's weights alone, and what each of them will hold."""

from __future__ import annotations

import logging
from typing import Any

import torch

from apb_ds.ops.memory import available_bytes
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.launcher import ranks_on_node
from apb_ds.weights.cut import WeightSizes, why_not_shardable

# Of the memory that is available, what a copy of the weights may take: the rest is for documents.
WEIGHTS_SHARE = 0.8
GIB = 2**30

logger = logging.getLogger(__name__)


def choose_shards(model: Any, device: torch.device, group: SequenceGroup) -> bool:
    """Decide what ``shard_weights=auto`` means: true if a copy of the weights does not fit on every rank.

    Parameters
    ----------
    model : transformers PreTrainedModel without data
    device : for the weights
    group : the ranks that would hold a copy together. All ranks that it is a part of call this together, and decide
        alike; the first one logs why.
    """
    mine = why_not_shardable(model)
    if mine is None and getattr(model.config, "quantization_config", None):
        mine = "the weights are quantised."
    sharing = ranks_on_node() if device.type == "cpu" else 1
    size = 0 if mine is not None else WeightSizes.of(model, group.world_size).whole
    # The stages of a pipeline have other layers than each other, and decide alike, too.
    everyone = group.all_ranks.gather_objects((mine, size, available_bytes(device) // sharing))
    why = next((reason for reason, _, _ in everyone if reason is not None), None)
    size, room = max(size for _, size, _ in everyone), int(min(room for _, _, room in everyone) * WEIGHTS_SHARE)
    shards = why is None and size > room
    if why is None:
        why = f"a copy of the weights takes {_gib(size)}, and a rank has room for {_gib(room)}."
    if group.all_ranks.is_first:
        logger.info("model.shard_weights=auto is %s: %s", str(shards).lower(), why)
    return shards


def log_sizes(model: Any, group: SequenceGroup) -> None:
    """Have the first rank say what each will hold of a model without data that several hold together."""
    if group.all_ranks.is_first and group.world_size > 1:
        sizes = WeightSizes.of(model, group.world_size)
        logger.info(
            "Each rank will hold %s of weights: one of %d parts of the linear layers, %s, and embeddings, norms and "
            "biases, %s. A prefill gathers two layers: %s more.",
            _gib(sizes.part + sizes.replicated),
            group.world_size,
            _gib(sizes.part),
            _gib(sizes.replicated),
            _gib(sizes.gathered),
        )


def _gib(number: int) -> str:
    return f"{number / GIB:.3g} GiB"
