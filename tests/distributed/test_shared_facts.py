"""What an engine's ranks must share besides a request: heads, kernels; and what is the same in two spellings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.heads import random_checkpoint, save_heads
from tests.models import build_model, request_ids
from tests.pool import Pools

DOCUMENT, QUERY = request_ids(101, 5)


def new_engine(**given: Any) -> Any:
    import apb_ds

    return apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(hosts=4, **given))


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def other_heads(rank: int, world_size: int) -> str:
    import apb_ds

    engine = new_engine()
    with tempfile.TemporaryDirectory() as folder:
        file = save_heads(Path(folder) / "heads.pt", random_checkpoint(engine.module, seed=rank))
        engine.configure(apb_ds.APBConfig(hosts=4, compressor="retaining_heads"), str(file))
    return message_of(lambda: engine.prefill(DOCUMENT, QUERY))


def other_kernels(rank: int, world_size: int) -> str:
    """As if a package were installed on one rank alone, with kernel=auto."""
    from unittest import mock

    engine = new_engine()
    with mock.patch.dict(engine._shared_facts, {"kernels": {"prefill": ("cpu_flash", "reference")[rank]}}):
        return message_of(lambda: engine.prefill(DOCUMENT, QUERY))


def missing_kernel(rank: int, world_size: int) -> str:
    from unittest import mock

    from apb_ds.ops.kernels import CPUFlashKernel

    installed = classmethod(lambda cls: rank == 0)
    with mock.patch.object(CPUFlashKernel, "is_installed", installed):
        return message_of(lambda: new_engine(kernel="cpu_flash"))


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (other_heads, ("retaining heads is",)),
        (other_kernels, ("kernels is", "cpu_flash", "reference")),
        (missing_kernel, ("cpu_flash", "not installed")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_difference_is_told_on_every_rank(pool: Pools, case: Callable[..., str], parts: tuple[str, ...]) -> None:
    for message in pool(2).run(case):
        assert all(part in message for part in parts), message


def one_ratio_in_two_spellings(rank: int, world_size: int) -> torch.Tensor:
    engine = new_engine(compression_ratio=(8, 8.0)[rank])
    return engine.query_logits(QUERY, context=engine.prefill(DOCUMENT))


def test_a_ratio_of_8_and_one_of_8_point_0_agree(pool: Pools) -> None:
    first, second = pool(2).run(one_ratio_in_two_spellings)
    assert torch.equal(first, second)
