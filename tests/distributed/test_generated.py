"""Requests that nobody wrote by hand, on two ranks: one answer or one ValueError for both, and no waiting."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from hypothesis import given, settings

from tests.generated import Request, answer, check_against_reference, requests
from tests.models import build_model
from tests.pool import Pools

_ENGINES: dict[int, Any] = {}  # of a rank's process


def serve(rank: int, world_size: int, request: Request) -> tuple[str, Any]:
    """Return the logits as nested lists, or why there are none."""
    package = importlib.import_module("apb_ds")
    if world_size not in _ENGINES:
        _ENGINES[world_size] = package.init_inference(build_model("llama"), package.APBConfig())
    try:
        return "answered", answer(_ENGINES[world_size], request).numpy()
    except ValueError as error:
        return "refused", str(error)


@pytest.fixture(scope="module")
def judge() -> Any:
    return build_model("llama")


def check(pool: Pools, judge: Any, request: Request) -> str:
    torch = importlib.import_module("torch")
    (kind, first), (other, second) = pool(2).run(serve, request)
    assert kind == other
    if kind == "refused":
        assert first == second
        return kind
    assert (first == second).all()
    return check_against_reference(judge, request, torch.from_numpy(first))


@given(request=requests(max_tokens=120))
@settings(max_examples=max(1, settings().max_examples // 2))
def test_an_answer_or_a_value_error(pool: Pools, judge: Any, request: Request) -> None:
    check(pool, judge, request)


@pytest.mark.parametrize(
    ("request_", "outcome"),
    [
        (Request(120, 5, given={"hosts": 8, "compressor": "window"}), "same"),
        (Request(3, 2, given={"hosts": 16, "anchor_length": 0, "passing_length": 1, "compressor": "recent"}), "same"),
        (Request(1, 1, given={"hosts": 2, "anchor_length": 0, "passing_length": 1, "compressor": "recent"}), "same"),
        (Request(30, 5, given={"hosts": 8}), "exact"),
        (Request(30, 5, given={"hosts": 3}), "refused"),
        (Request(30, 5, odd_ids=(-1,), given={"hosts": 2}), "refused"),
    ],
    ids=str,
)
def test_what_comes_of_it(pool: Pools, judge: Any, request_: Request, outcome: str) -> None:
    assert check(pool, judge, request_) == outcome
