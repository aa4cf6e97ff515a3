"""More ranks than tokens, in bfloat16, with moderate and with huge logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import build_model, request_ids
from tests.pool import Pools
from tests.reference import run_reference
from tests.unit.test_numerics import HALF_TOLERANCE

RANKS = 4
LENGTHS = (1, 2, 3, 5)
GIVEN: list[dict[str, Any]] = [
    {"hosts": 4, "anchor_length": 0, "passing_length": 1, "compressor": "recent"},
    {"hosts": 8, "anchor_length": 1, "passing_length": 1, "compressor": "recent", "query_in_anchor": False},
    {"hosts": 4},
]


def model_of(sharpness: float) -> Any:
    model = build_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(sharpness)
    return model


def answer_all(rank: int, world_size: int, sharpness: float) -> list[torch.Tensor]:
    import apb_ds

    engine = apb_ds.init_inference(model_of(sharpness), apb_ds.APBConfig())
    answers = []
    for given in GIVEN:
        engine.configure(apb_ds.APBConfig(**given))
        for n in LENGTHS:
            document, query = request_ids(n, 3)
            answers.append(engine.query_logits(query, context=engine.prefill(document, query)))
    return answers


@pytest.mark.parametrize("sharpness", [1.0, 60.0])
def test_more_ranks_than_tokens(pool: Pools, sharpness: float) -> None:
    by_rank = pool(RANKS).run(answer_all, sharpness)
    requests = [(given, n) for given in GIVEN for n in LENGTHS]
    judge = model_of(sharpness)
    for place, (given, n) in enumerate(requests):
        logits = [answers[place] for answers in by_rank]
        assert all(torch.equal(one, logits[0]) for one in logits)
        assert bool(logits[0].isfinite().all())
        if sharpness == 1.0:
            document, query = request_ids(n, 3)
            expected = run_reference(judge, document, query, **given).logits.float()
            assert float((logits[0] - expected).abs().max()) < HALF_TOLERANCE[torch.bfloat16]
