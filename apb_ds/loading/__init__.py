"""Loading models: from a path, a hub id or a geometry to a model on its device."""

from __future__ import annotations

from apb_ds.loading.config import ModelConfig
from apb_ds.loading.model import LoadedModel, load_model

__all__ = ["LoadedModel", "ModelConfig", "load_model"]
