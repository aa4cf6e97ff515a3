"""Requests that nobody wrote by hand: the reference's answer or a ValueError, and never anything else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given

import apb_ds
from tests.generated import Request, answer, check_against_reference, requests
from tests.models import build_model

OUTCOMES: Counter[str] = Counter()


@pytest.fixture(scope="module")
def engine() -> Any:
    return apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig())


@pytest.fixture(scope="module")
def judge() -> Any:
    return build_model("llama")


@given(request=requests())
@example(request=Request(300, 24, given={"hosts": 16, "compressor": "window"}))
@example(request=Request(1, 1, given={"hosts": 16, "anchor_length": 0, "passing_length": 1}))
@example(request=Request(300, 3, num_kinds=1, given={"hosts": 8, "anchor_length": 12, "passing_length": 3}))
@example(request=Request(40, 3, given={"hosts": 4, "query_position": 60, "anchor_length": 9}))
def test_an_answer_or_a_value_error(engine: Any, judge: Any, request: Request) -> None:
    try:
        logits = answer(engine, request)
    except ValueError as error:
        assert str(error)
        OUTCOMES["refused"] += 1
        return
    OUTCOMES[check_against_reference(judge, request, logits)] += 1


def test_most_requests_were_compared() -> None:
    """After the one above: a generator of bad requests alone would show nothing."""
    if not OUTCOMES:
        pytest.skip("missing: the requests of the test above, which was not run")
    assert OUTCOMES["same"] > 0.2 * OUTCOMES.total(), OUTCOMES
    assert OUTCOMES["refused"] and OUTCOMES["exact"], OUTCOMES
