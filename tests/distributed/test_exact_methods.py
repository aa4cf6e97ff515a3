"""Ring and Ulysses over 2 and 4 ranks, held to the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import apb_ds
from apb_ds.config import APBConfig
from apb_ds.parallel.groups import SequenceGroup
from tests import models
from tests.engine_cases import TOLERANCE, own_query_logits
from tests.models import request_ids
from tests.pool import Pools

# 4 KV heads, so that Ulysses can share them over 4 ranks. Lengths that do not divide, and fewer tokens than blocks.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.llama(num_key_value_heads=4),
    "qwen2": lambda: models.qwen2(num_key_value_heads=4),
}
LENGTHS = (1, 3, 5, 8, 37, 101)
QUERY = 4
NEW = 5


def answer(rank: int, world_size: int, method: str, family: str) -> dict[int, tuple[torch.Tensor, torch.Tensor, int]]:
    engine = apb_ds.init_inference(
        FAMILIES[family](), APBConfig(method=method), group=SequenceGroup.of(torch.distributed.group.WORLD)
    )
    answers = {}
    for n in LENGTHS:
        document, query = request_ids(n, QUERY)
        sent = engine.group.bytes_sent
        context = engine.prefill(document)
        sent = engine.group.bytes_sent - sent
        logits = own_query_logits(engine, query, context)
        answers[n] = logits, engine.generate(document, query, max_new_tokens=NEW, do_sample=False), sent
    return answers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_the_plain_models_answers(pool: Pools, method: str, world_size: int, family: str) -> None:
    model = FAMILIES[family]()
    ranks = pool(world_size).run(answer, method, family, timeout=120)
    for n in LENGTHS:
        document, query = request_ids(n, QUERY)
        ids = torch.cat([document, query], dim=1)
        with torch.no_grad():
            expected = model(ids).logits[:, n:]
        tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False)[:, n + QUERY :]
        for found in ranks:
            logits, generated, _ = found[n]
            assert torch.allclose(logits, expected, atol=TOLERANCE, rtol=0), (n, (logits - expected).abs().max())
            assert torch.equal(generated, tokens)


@pytest.mark.whole_weights("counts bytes")
def test_bytes_sent_by_a_ring(pool: Pools) -> None:
    """Each of the layers but the last sends keys and values W - 1 times, a message of the longest blocks."""
    config = FAMILIES["llama"]().config
    for world_size in (2, 4):
        for found in pool(world_size).run(answer, "ring", "llama", timeout=120):
            n = 101
            lengths = [(i + 1) * n // (2 * world_size) - i * n // (2 * world_size) for i in range(2 * world_size)]
            message = 2 * 4 * (max(lengths[:world_size]) + max(lengths[world_size:]))
            message *= config.hidden_size // config.num_attention_heads * 4
            assert found[n][2] == message * (world_size - 1) * (config.num_hidden_layers - 1)


def refuse(rank: int, world_size: int, method: str) -> str:
    try:
        apb_ds.init_inference(
            models.llama(), APBConfig(method=method), group=SequenceGroup.of(torch.distributed.group.WORLD)
        )
    except ValueError as error:
        return str(error)
    return ""


def test_heads_that_do_not_divide(pool: Pools) -> None:
    for message in pool(4).run(refuse, "ulysses"):
        for part in ("4 query heads", "2 KV heads", "number of ranks (4)", "method=ring"):
            assert part in message
    assert pool(2).run(refuse, "ulysses") == ["", ""]
    for message in pool(2).run(refuse, "dense"):
        assert "method=dense runs on one rank" in message


def skip_a_step(rank: int, world_size: int) -> float:
    """The ring with one merge left out, for a tolerance that would not notice."""
    from apb_ds.methods import ring

    kept = ring._Running.attend
    calls = 0

    def attend(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != 2:
            kept(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring._Running, "attend", attend)
        engine = apb_ds.init_inference(
            FAMILIES["llama"](), APBConfig(method="ring"), group=SequenceGroup.of(torch.distributed.group.WORLD)
        )
        document, query = request_ids(37, QUERY)
        logits = own_query_logits(engine, query, engine.prefill(document))
    with torch.no_grad():
        expected = FAMILIES["llama"]()(torch.cat([document, query], dim=1)).logits[:, 37:]
    return float((logits - expected).abs().max())


def test_a_step_left_out_is_noticed(pool: Pools) -> None:
    assert min(pool(2).run(skip_a_step, timeout=120)) > 10 * TOLERANCE
