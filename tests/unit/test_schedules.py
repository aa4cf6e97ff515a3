"""Batches that hypothesis makes up: each answer is the plain model's, whoever joins, leaves or appends meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import apb_ds
import tests.generated  # noqa: F401  settings of hypothesis
from tests.schedules import EXACT, FULL_SCHEDULE, Action, play, schedule_model, schedules, small_sizes

SEEN: Counter[str] = Counter()


@pytest.fixture(scope="module")
def engine() -> Any:
    return apb_ds.init_inference(schedule_model(), apb_ds.APBConfig(**EXACT))


@pytest.fixture(scope="module")
def judge() -> Any:
    return schedule_model()


@pytest.fixture(autouse=True, scope="module")
def sizes() -> Iterator[None]:
    with small_sizes():
        yield


@given(actions=schedules, copies=st.booleans())
@example(actions=FULL_SCHEDULE, copies=False)
@example(actions=FULL_SCHEDULE, copies=True)
def test_every_answer_is_the_plain_models(engine: Any, judge: Any, actions: list[Action], copies: bool) -> None:
    scene = play(engine, judge, actions, copies=copies)
    SEEN["asked"] += len(scene.asked)
    SEEN["documents copied"] += sum(one.handle.copies_document for one in scene.asked)
    SEEN["cancelled"] += sum(one.handle.error is not None for one in scene.asked)
    SEEN["ended early"] += sum(one.handle.error is None and len(one.handle.tokens) < one.num_new for one in scene.asked)
    turns = Counter(id(one.source) for one in scene.asked if one.is_settled)
    SEEN["later turns"] += sum(number - 1 for number in turns.values())


def test_they_had_what_matters() -> None:
    """After the one above: schedules in which little happens would show nothing."""
    if not SEEN:
        pytest.skip("missing: the schedules of the test above, which was not run")
    assert SEEN["asked"] > 100, SEEN
    assert all(SEEN[name] > 5 for name in ("cancelled", "ended early", "later turns", "documents copied")), SEEN
