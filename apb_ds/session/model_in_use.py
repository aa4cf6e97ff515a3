"""A session's model with its heads and engine, kept from job to job while its config stays the same."""

from __future__ import annotations

import gc
from typing import Any

import torch

from apb_ds.compressors.base import needs_heads
from apb_ds.compressors.retaining_heads import RetainingHeads
from apb_ds.config import APBConfig
from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.loading.heads import heads_for
from apb_ds.loading.model import with_positions_of
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.pipeline import Pipeline
from apb_ds.session.job import EngineSettings


class ModelInUse:
    """A loaded model.

    Parameters
    ----------
    group : the ranks that hold the weights together where the config shards them
    pipeline : of which the model is a stage, or None

    Attributes
    ----------
    loaded : the model and its tokenizer
    """

    def __init__(
        self,
        config: ModelConfig,
        loaded: LoadedModel | None = None,
        group: SequenceGroup | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.config = config
        self.group = group
        self.pipeline = pipeline
        self.loaded: LoadedModel = loaded or load_model(config, group=group, pipeline=pipeline)
        self._heads: tuple[str, RetainingHeads | None] | None = None
        self._engine: Any = None

    def with_config(self, config: ModelConfig, group: SequenceGroup) -> ModelInUse | None:
        """Return the same weights with another config, in place of this object; None if they must be loaded again.

        Parameters
        ----------
        group : as above
        """
        if not config.shares_weights_with(self.config):
            return None
        loaded = with_positions_of(self.loaded, config)
        return None if loaded is None else ModelInUse(config, loaded, group)

    def load_heads(self, settings: EngineSettings) -> None:
        """Load the retaining heads that a job needs, unless they are loaded."""
        path = settings.retaining_heads
        if path is not None and (self._heads is None or self._heads[0] != path):
            heads = heads_for(self.loaded.model, settings.method, path)
            self._heads = path, None if heads is None else heads.placed(self.loaded.device, self.loaded.dtype)

    def engine(self, method: APBConfig, group: SequenceGroup, timeout_s: float) -> Any:
        """Return the engine, with these settings in force."""
        from apb_ds.engine.api import init_inference  # imports deepspeed

        heads = self._heads[1] if self._heads is not None and needs_heads(method.compressor) else None
        if self._engine is None:
            self._engine = init_inference(
                self.loaded.model,
                method,
                group=group,
                retaining_heads=heads,
                timeout_s=timeout_s,
                shard_weights=self.loaded.shard_weights,
                shard_ranks=self.group.world_size if self.group is not None and self.loaded.shard_weights else None,
                stages=1 if self.pipeline is None else self.pipeline.num_stages,
            )
        else:
            self._engine.configure(method, heads)
        return self._engine


def free_memory() -> None:
    """Release the memory of a model that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
