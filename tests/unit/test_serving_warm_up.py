"""What a server computes before its first request, so that nothing is compiled while others wait."""

from __future__ import annotations

from typing import Any

import pytest

from apb_ds.engine import batch
from apb_ds.serving import warm_up
from tests.serving import tiny_engine


def test_it_answers_alone_and_together_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    steps: set[tuple[int, ...]] = set()
    lengths: set[int] = set()
    run_pack = batch.run_pack

    def run(engine: Any, members: Any) -> Any:
        documents = [id(member.prefix) for member in members]
        if all(len(member.fed) == 1 for member in members):
            steps.add(tuple(documents.count(one) for one in dict.fromkeys(documents)))
        lengths.update(member.prefix.num_tokens for member in members)
        return run_pack(engine, members)

    monkeypatch.setattr(batch, "run_pack", run)
    warm_up.warm_up(engine, 2**30)
    assert {tuple(sorted(number for number in pair if number)) for pair in warm_up.ASKED_TOGETHER} == {
        tuple(sorted(numbers)) for numbers in steps
    }
    assert len(lengths) == 2 and max(lengths) * warm_up.LONGEST_SHARE <= engine.module.config.max_position_embeddings
    assert all(slab.is_unused for slab in engine.pool._slabs.values())
