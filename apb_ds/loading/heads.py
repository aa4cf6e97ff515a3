"""Retaining heads for a model: found, read, and checked against the model's sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from apb_ds.compressors.base import names_with_heads, needs_heads
from apb_ds.compressors.retaining_heads.checkpoint import FIELD, FILE_PATTERNS, check_state, read_heads
from apb_ds.compressors.retaining_heads.compressor import no_heads
from apb_ds.compressors.retaining_heads.module import HeadSizes, RetainingHeads
from apb_ds.config import APBConfig, BlockSettings
from apb_ds.hf.architecture import attention_sizes, text_config
from apb_ds.hf.interface import check_projections
from apb_ds.loading.source import find_files

HeadsSource = str | os.PathLike[str] | RetainingHeads


def heads_for(model: PreTrainedModel, config: APBConfig, given: HeadsSource | None) -> RetainingHeads | None:
    """Return the heads that the settings need, on the CPU if they are read here; None if they need none.

    Parameters
    ----------
    given : path, ``package://<package>/<path>``, hub id, or loaded heads

    Raises
    ------
    ValueError
        If heads are missing, not needed, not found, or do not fit the model.
    """
    settings = config.settings
    compressor = settings.compressor if isinstance(settings, BlockSettings) else ""
    if not needs_heads(compressor):
        if given is not None:
            shown = type(given).__name__ if isinstance(given, RetainingHeads) else repr(str(given))
            raise ValueError(
                f"{FIELD}={shown} goes with compressor={names_with_heads()}, not {compressor!r}; set that, or "
                f"leave {FIELD} out."
            )
        return None
    if given is None:
        raise ValueError(no_heads(compressor))
    check_projections(model)
    sizes = head_sizes(model)
    if isinstance(given, RetainingHeads):
        check_state(given.published_state(), sizes)
        return given
    return load_heads(os.fspath(given), sizes)


def head_sizes(model: PreTrainedModel) -> HeadSizes:
    """Read the sizes of a model's heads from its config."""
    sizes, config = attention_sizes(model), text_config(model)
    activation: Any = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if not isinstance(activation, str):
        raise ValueError(
            f"{type(model).__name__} has no hidden_act in its config; retaining heads use the model's activation."
        )
    return HeadSizes(sizes.num_layers, sizes.heads, sizes.kv_heads, sizes.head_dim, activation)


def load_heads(path: str, sizes: HeadSizes, field: str = FIELD) -> RetainingHeads:
    """Read heads, downloading a hub id that is not in the cache.

    Raises
    ------
    ValueError
        If they are not found (saying where they were looked for), damaged, or made for another model.
    """
    return read_heads(find_files(path, FILE_PATTERNS, _missing, field), sizes, field)


def _missing(directory: Path) -> list[str]:
    found = any(file.is_file() for pattern in FILE_PATTERNS for file in directory.glob(pattern))
    return [] if found else [" or ".join(FILE_PATTERNS)]
