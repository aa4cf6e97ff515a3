"""A model as a pipeline of stages: the tokens of the whole model, what each stage holds, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_sharded_weights import GIVEN, METHODS, answers, expected, new_engine
from tests.pool import Pools


def answer(
    rank: int, world_size: int, family: str, given: dict[str, Any], num_document: int, options: dict[str, Any]
) -> Any:
    engine = new_engine(family, given, **options)
    return answers(engine, num_document)


def check(pool: Pools, world_size: int, family: str, case: str = "", **options: Any) -> None:
    given, num_document = METHODS.get(case, (GIVEN, 203))
    for found in pool(world_size).run(answer, family, given, num_document, options, timeout=180):
        assert found == expected(family, case), (family, case)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_stages_give_the_tokens_of_the_whole_model(pool: Pools, family: str, world_size: int) -> None:
    check(pool, world_size, family, stages=2)
