"""Shared by all tests: the pool of ranks, and skips for what a marked test needs."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors, more threads only wait for each other

import torch

from tests.pool import Pools


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh-cache", action="store_true", help="convert models into a temporary cache")
    parser.addoption("--fault-times", metavar="FILE", help="write the fault tests' measurements as JSON")
    parser.addoption("--shard-weights", action="store_true", help="shard weights in the engines of tests/distributed")


def pytest_configure(config: pytest.Config) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _missing(item: pytest.Item) -> str | None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    if item.get_closest_marker("launcher") and shutil.which("bash") is None:
        return "the deepspeed launcher needs bash"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shard-weights"):
        whole = [item for item in items if item.get_closest_marker("whole_weights")]
        config.hook.pytest_deselected(items=whole)
        items[:] = [item for item in items if item not in whole]
    for item in items:
        missing = _missing(item)
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"missing: {missing}"))


@pytest.fixture(scope="session", autouse=True)
def cache_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """With ``--fresh-cache``, keep converted models away from the user's cache."""
    if not request.config.getoption("--fresh-cache"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APB_DS_CACHE", str(tmp_path_factory.mktemp("apb_ds_cache")))
        yield


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[Pools]:
    """Ranks that the session reuses: ``pool(2).run(function, *args)``."""
    pools = Pools(request.config.getoption("--shard-weights"))
    yield pools
    pools.close()
