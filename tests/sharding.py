"""Sharding the weights of every engine that a process of the pool makes, where nothing else is asked for."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any


def shard_by_default() -> None:
    """Change what `init_inference` and a session's loading do in this process, for good."""
    from transformers import PreTrainedModel

    from apb_ds.engine import api
    from apb_ds.session import model_in_use
    from apb_ds.weights import is_sharded
    from apb_ds.weights.cut import why_not_shardable

    make, load = api.init_inference, model_in_use.load_model

    @functools.wraps(make)
    def init_inference(model: Any, *arguments: Any, **given: Any) -> Any:
        if "shard_weights" not in given and isinstance(model, PreTrainedModel):
            given["shard_weights"] = is_sharded(model) or why_not_shardable(model) is None
        return make(model, *arguments, **given)

    @functools.wraps(load)
    def load_model(config: Any, *arguments: Any, group: Any = None, **given: Any) -> Any:
        if group is not None and group.world_size > 1:
            config = replace(config, shard_weights=config.shard_weights or True)  # also a model that is refused
        return load(config, *arguments, group=group, **given)

    api.init_inference, model_in_use.load_model = init_inference, load_model
