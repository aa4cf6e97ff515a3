"""Host memory of documents that have left it."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Return freed memory to the system, which glibc would keep in parts; elsewhere nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
