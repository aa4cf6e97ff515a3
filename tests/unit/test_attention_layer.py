"""`APBAttention` as a layer of somebody's own decoder, at one rank: rounds driven by hand, without the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apb_ds
from apb_ds.attention import APBAttention, Phase
from apb_ds.cache import ShardedCache
from apb_ds.methods.state import PrefillState
from apb_ds.parallel.groups import SequenceGroup
from tests.plain_decoder import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYER,
    LAYERS,
    Decoder,
    ask_by_hand,
    dense_logits,
    draw_ids,
    masked_attention,
    prefill_by_hand,
)

TOLERANCE = 1e-4  # float32 sums in another order; one token more or less moves logits by over 1e-2


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder().eval()


def answer(decoder: Decoder, document: torch.Tensor, query: torch.Tensor, **given: Any) -> torch.Tensor:
    """Logits of the query, its first tokens at once and its last three one by one."""
    config = apb_ds.APBConfig(**given)
    attention = APBAttention(config)
    plan = apb_ds.plan_request(config, document.shape[1], 0)
    cache = prefill_by_hand(decoder, attention, plan, document)
    logits = [ask_by_hand(decoder, attention, cache, query[:, :-3], Phase.QUERY)]
    logits += [ask_by_hand(decoder, attention, cache, token, Phase.DECODE) for token in query[:, -3:].split(1, dim=1)]
    assert cache.get_seq_length() == document.shape[1] + query.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("schedule", ["zigzag", "natural"])
@pytest.mark.parametrize(
    "n, given",
    [
        (83, {"hosts": 4, "anchor_length": 0, "passing_length": 21}),
        (83, {"hosts": 8, "anchor_length": 0, "passing_length": 400, "compressor": "knorm"}),
        (83, {"hosts": 1}),
        (20, {"hosts": 4, "anchor_length": 6}),  # the anchor is longer than a block
        (3, {"hosts": 4, "anchor_length": 0, "passing_length": 1}),
    ],
)
def test_exact_settings_are_dense_causal_attention(
    decoder: Decoder, n: int, given: dict[str, Any], schedule: str
) -> None:
    document, query = draw_ids(n, 1), draw_ids(9, 2)
    expected = dense_logits(decoder, torch.cat([document, query], dim=1))[:, n:]
    actual = answer(decoder, document, query, schedule=schedule, **given)
    assert float((actual - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("anchor_length", [0, 1, 7])
def test_blocks_see_the_anchor_and_themselves(decoder: Decoder, anchor_length: int) -> None:
    """Nothing passed: the mask is the same for all heads and can be written down."""
    n, q, hosts = 83, 9, 4
    document, query = draw_ids(n, 1), draw_ids(q, 2)
    anchor, total = document[:, :anchor_length], anchor_length + n + q
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:anchor_length, :anchor_length] = True
    for host in range(hosts):
        start, stop = (anchor_length + i * n // hosts for i in (host, host + 1))
        mask[start:stop, start:stop] = True
        mask[start:stop, :anchor_length] = host > 0
    mask[-q:, anchor_length:] = True
    ids = torch.cat([anchor, document, query], dim=1)
    positions = torch.cat([torch.arange(anchor_length), torch.arange(n + q)])
    expected = decoder(ids, positions, masked_attention(mask.tril()))[:, -q:]

    given = {"hosts": hosts, "anchor_length": anchor_length, "passing_length": 0}
    assert float((answer(decoder, document, query, **given) - expected).abs().max()) < TOLERANCE
    dense = dense_logits(decoder, torch.cat([document, query], dim=1))[:, n:]
    assert float((expected - dense).abs().max()) > 0.1


def test_one_instance_has_no_parameters_and_says_what_it_is() -> None:
    attention = APBAttention(apb_ds.APBConfig(hosts=4))
    assert list(attention.parameters()) == []
    assert str(attention) == "APBAttention(method=apb, hosts=4, ranks=1)"


def states(heads: int = KV_HEADS, tokens: int = 5, head_dim: int = HEAD_DIM, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, heads, tokens, head_dim)


@pytest.mark.parametrize(
    "query, key, value, named",
    [
        (states(HEADS)[0], states(), states(), ["query", "(1, heads, tokens, head_dim)", "(4, 5, 8)"]),
        (states(HEADS, batch=2), states(), states(), ["query", "(2, 4, 5, 8)"]),
        (states(HEADS), states(), states(tokens=6), ["key", "value", "(1, 2, 5, 8)", "(1, 2, 6, 8)"]),
        (states(HEADS), states(head_dim=4), states(head_dim=4), ["(1, kv_heads, keys, 8)", "(1, 2, 5, 4)"]),
        (states(HEADS), states(batch=2), states(batch=2), ["(1, kv_heads, keys, 8)", "(2, 2, 5, 8)"]),
        (states(HEADS), states(3), states(3), ["4 query heads", "3 KV heads"]),
    ],
)
def test_wrong_shapes_are_said(query: Any, key: Any, value: Any, named: list[str]) -> None:
    attention = APBAttention(apb_ds.APBConfig(hosts=4))
    with pytest.raises(ValueError) as caught:
        attention(query, key, value, phase=Phase.QUERY, layer_idx=0)
    assert all(word in str(caught.value) for word in named), caught.value


def test_prefill_checks_its_tokens_against_the_plan() -> None:
    config = apb_ds.APBConfig(hosts=4, anchor_length=2, query_in_anchor=False)
    attention = APBAttention(config)
    plan = apb_ds.plan_request(config, 20, 0)
    state = PrefillState(plan, ShardedCache([LAYER] * LAYERS, 0, 1, 20))
    with pytest.raises(ValueError) as caught:
        attention(states(HEADS, 6), states(tokens=6), states(tokens=6), phase=Phase.PREFILL, layer_idx=0, state=state)
    assert "6" in str(caught.value)
    assert "7" in str(caught.value)  # two of the anchor, five of the block


def test_prefill_needs_its_state() -> None:
    attention = APBAttention(apb_ds.APBConfig(hosts=4))
    with pytest.raises(ValueError, match="state"):
        attention(states(HEADS), states(), states(), phase=Phase.PREFILL, layer_idx=0)


@pytest.mark.parametrize("phase", [Phase.QUERY, Phase.DECODE])
def test_several_ranks_must_say_which_one_holds_the_new_tokens(phase: Phase) -> None:
    attention = APBAttention(apb_ds.APBConfig(hosts=4), SequenceGroup(rank=0, world_size=2))
    with pytest.raises(ValueError, match=f"phase={phase.name} on several ranks needs holds_new=cache.holds_new"):
        attention(states(HEADS), states(), states(), phase=phase, layer_idx=0)


@pytest.mark.parametrize("given, named", [({"compressor": "windw"}, "window"), ({"kernel": "referense"}, "reference")])
def test_unknown_names_are_refused_at_once(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        APBAttention(apb_ds.APBConfig(hosts=4, **given))
