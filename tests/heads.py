"""Retaining heads with random weights, in the format of the published checkpoints, for tests."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN = 24


def random_checkpoint(model: Any, hidden: int = HIDDEN, seed: int = 0) -> dict[str, Any]:
    """Return the contents of a checkpoint: heads for every layer of the model, and other objects."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    channels = (heads + 2 * kv_heads) * head_dim
    generator = torch.Generator().manual_seed(500 + seed)
    checkpoint: dict[str, Any] = {}
    for layer in range(config.num_hidden_layers):
        for name, rows, columns in (("fc1", hidden, channels), ("fc2", kv_heads, hidden)):
            weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
            checkpoint[f"model.layers.{layer}.self_attn.{name}.weight"] = weight
    checkpoint["model.layers.0.self_attn.q_proj.weight"] = torch.ones(2, 3)
    checkpoint["model.layers.0.mlp.fc1.weight"] = torch.ones(2, 3)
    return checkpoint


def save_heads(file: Path, checkpoint: dict[str, Tensor]) -> Path:
    """Write a checkpoint in the format of the file's suffix."""
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(checkpoint, file)
    else:
        torch.save(checkpoint, file)
    return file


def engine_with_heads(model: Any, **options: Any) -> Any:
    """Return an engine with random heads; `configure` changes its settings."""
    import apb_ds

    with tempfile.TemporaryDirectory() as folder:
        file = save_heads(Path(folder) / "heads.pt", random_checkpoint(model))
        config = apb_ds.APBConfig(compressor="retaining_heads")
        return apb_ds.init_inference(model, config, retaining_heads=str(file), **options)
