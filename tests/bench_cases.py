"""A small benchmark: the composed config of launch/bench.py for a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LAYERS = 2
TINY = {
    "model.path": "null",
    "model.load_format": "dummy",
    "model.device": "cpu",
    "model.num_layers": LAYERS,
    "model.geometry.num_hidden_layers": 3,
    "model.geometry.hidden_size": 32,
    "model.geometry.intermediate_size": 48,
    "model.geometry.num_attention_heads": 4,
    "model.geometry.num_key_value_heads": 2,
    "model.geometry.head_dim": 8,
    "model.geometry.vocab_size": 128,
    "task.num_tokens": 120,
    "bench.query_tokens": 4,
    "bench.decode_tokens": 2,
    "bench.repeats": 2,
    "method.hosts": 4,
    "method.anchor_length": 12,
    "method.passing_length": 5,
}


def composed(*overrides: str) -> dict[str, Any]:
    """Return the config that launch/bench.py composes."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("bench", list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def tiny(**bench: Any) -> dict[str, Any]:
    """Return the config of a tiny benchmark with the given settings under ``bench``."""
    values = composed(*(f"{path}={value}" for path, value in TINY.items()))
    values["bench"] |= bench
    return values
