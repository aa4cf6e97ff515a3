"""Compressors, one per file. Importing this package fills the registry."""

from apb_ds.compressors import heads_and_window, keydiff, knorm, query, random, recent, retaining_heads, window
from apb_ds.compressors.base import (
    BlockStates,
    Compressor,
    build_compressor,
    compressor_names,
    register_compressor,
)

__all__ = [
    "BlockStates",
    "Compressor",
    "build_compressor",
    "compressor_names",
    "heads_and_window",
    "keydiff",
    "knorm",
    "query",
    "random",
    "recent",
    "register_compressor",
    "retaining_heads",
    "window",
]
