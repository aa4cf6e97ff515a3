"""Freed host memory goes back to the system once a document has left."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import pytest

from apb_ds.cache import first_capacity
from apb_ds.serving import worker
from apb_ds.serving.documents import Limits
from apb_ds.serving.host_memory import return_freed_memory
from tests.serving import running, tiny_engine

MIB = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="missing: glibc")
def test_freed_memory_is_returned() -> None:
    process = psutil.Process()
    blocks = [b"x" * number for number in range(2**16, 2**16 + 2000)]  # small ones, which glibc keeps in its heap
    last = blocks.pop()  # glibc returns by itself what lies behind all that is in use
    del blocks
    before = process.memory_info().rss
    return_freed_memory()
    assert process.memory_info().rss < before - 60 * MIB
    assert len(last) == 2**16 + 1999


@pytest.mark.parametrize("disk", [0, 10])
def test_it_is_returned_when_a_document_leaves_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: int
) -> None:
    held: list[int] = []  # documents in memory each time
    engine = tiny_engine()
    size = engine.pool.document_bytes(first_capacity(200))
    with running(engine, Limits(size, 0, disk * size, 2**20), tmp_path) as half:

        def returned() -> Any:
            held.append(len(half.worker._contexts))

        monkeypatch.setattr(worker, "return_freed_memory", returned)
        for book in ("alpha", "beta", "alpha", "beta"):
            half.ask(f"{book} " * 20, "What about it?").wait()
    assert held == [0, 0, 0]
