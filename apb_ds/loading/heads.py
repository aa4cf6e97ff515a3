"""Retaining heads for a model: found where models are, checked against its sizes."""

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
from apb_ds.hf.architecture import attention_sizes
from apb_ds.hf.interface import check_projections
from apb_ds.loading.source import PACKAGE_SCHEME, expand_home, find_on_hub, package_path

HeadsSource = str | os.PathLike[str] | RetainingHeads


def heads_for(model: PreTrainedModel, config: APBConfig, given: HeadsSource | None) -> RetainingHeads | None:
    """Return the heads that the settings ask for, on the CPU if they are read here; None where they ask for none.

    Parameters
    ----------
    given : path, ``package://<package>/<path>``, hub id, or heads that are loaded already

    Raises
    ------
    ValueError
        If heads are missing, not asked for, not found, or do not fit the model.
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
    """Read what heads of a model must be like from its config."""
    sizes, config = attention_sizes(model), model.config
    activation: Any = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if not isinstance(activation, str):
        raise ValueError(
            f"{type(model).__name__} has no hidden_act in its config; retaining heads use the model's activation."
        )
    return HeadSizes(sizes.num_layers, sizes.heads, sizes.kv_heads, sizes.head_dim, activation)


def load_heads(path: str, sizes: HeadSizes, field: str = FIELD) -> RetainingHeads:
    """Read heads from where they are, downloaded first if it is a hub id that is not in the cache.

    Raises
    ------
    ValueError
        If they are not found (saying where it looked), damaged, or another model's.
    """
    return read_heads(_find(path, field), sizes, field)


def _find(path: str, field: str) -> Path:
    if path.startswith(PACKAGE_SCHEME):
        return package_path(path, field)
    local = expand_home(path)
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") != 1 or path.endswith(FILE_ENDINGS)
    if local.exists() or looks_local:
        return local
    return find_on_hub(path, FILE_PATTERNS, field, any_of=True)


FILE_ENDINGS = tuple(pattern.removeprefix("*") for pattern in FILE_PATTERNS)
