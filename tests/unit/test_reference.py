"""The reference itself, judged against what is plainly true, before it judges anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import FAMILIES, build_model, request_ids
from tests.reference import (
    STAR,
    exact_logits,
    reference_greedy,
    resolve_settings,
    run_reference,
)

TOLERANCE = 1e-4


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_passing_everything_is_the_plain_model(family: str) -> None:
    model = build_model(family).double()
    document, query = request_ids(59, 5)
    run = run_reference(model, document, query, hosts=4, anchor_length=0, passing_length=99, compressor="keydiff")
    plain = exact_logits(model, torch.cat([document, query], dim=1))[:, -5:]
    assert not run.layout.settings.exact
    assert run.logits.shape == plain.shape == (1, 5, model.config.vocab_size)
    assert largest_difference(run.logits, plain) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_sharp_and_logits_vary(family: str) -> None:
    document, query = request_ids(90, 6)
    run = run_reference(build_model(family), document, query, hosts=1)
    weights = torch.stack(run.largest_weight)[:, :, -40:]
    assert float(weights.mean()) > 0.2, "uniform attention over 90 tokens would give 0.011"
    assert float(run.logits.std()) > 0.5


@pytest.mark.parametrize("settings", [{"hosts": 1}, {"hosts": 3, "anchor_length": 21}, {"hosts": 8}])
def test_exact_fallback_is_the_plain_model(settings: dict[str, Any]) -> None:
    model = build_model("llama")
    document, query = request_ids(60, 9)
    run = run_reference(model, document, query, **settings)
    assert run.layout.settings.exact
    plain = exact_logits(model, torch.cat([document, query], dim=1))[:, -9:]
    assert largest_difference(run.logits, plain) < 1e-5


def test_plain_model_without_hooks_agrees() -> None:
    for family in ("llama", "dynamic_rope", "phi3_switching"):
        document, query = request_ids(60, 7)
        ids = torch.cat([document, query], dim=1)
        with torch.no_grad():
            plain = build_model(family)(input_ids=ids).logits
        assert largest_difference(exact_logits(build_model(family), ids), plain) < 1e-6


def _show(rows: str, column: str):
    """Return an edit that shows one more token to the query's rows, or to those of block 2, in every layer."""

    def edit(layer: int, masks: torch.Tensor, layout) -> torch.Tensor:
        block = layout.settings.block(2)
        first, last = layout.query_start, layout.num_tokens - 1
        if rows == "block":
            first, last = layout.document_index(block.start), layout.document_index(block.stop - 1)
        masks = masks.clone()
        if column == "next":
            for row in range(first, last):
                assert not masks[:, row, row + 1].any()
                masks[:, row, row + 1] = True
            return masks
        seen = masks[:, first].any(dim=0)
        candidates = range(layout.document_start) if column == "anchor" else range(layout.document_start, first)
        hidden = next(index for index in candidates if not seen[index])
        masks[:, first : last + 1, hidden] = True
        return masks

    return edit


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "rows, column", [("query", "anchor"), ("query", "next"), ("block", "document"), ("block", "next")]
)
def test_one_more_visible_token_is_noticed(family: str, rows: str, column: str) -> None:
    model = build_model(family)
    document, query = request_ids(61, 5)
    settings: dict[str, Any] = {"hosts": 4, "anchor_length": 9, "passing_length": 3, "compressor": "knorm"}
    good = run_reference(model, document, query, **settings).logits
    bad = run_reference(model, document, query, edit_mask=_show(rows, column), **settings).logits
    assert largest_difference(good, bad) > 10 * TOLERANCE


def test_a_swapped_selection_is_noticed() -> None:
    model = build_model("llama")
    document, query = request_ids(61, 5)
    settings: dict[str, Any] = {"hosts": 4, "anchor_length": 9, "passing_length": 3, "query_in_anchor": False}
    runs = {
        name: run_reference(model, document, query, compressor=name, **settings)
        for name in ("knorm", "keydiff", "window", "recent", "random")
    }
    for name, run in runs.items():
        for other, judged in runs.items():
            if name != other:
                assert largest_difference(run.logits, judged.logits) > 10 * TOLERANCE, (name, other)


@pytest.mark.parametrize("family", ["phi3_switching", "dynamic_rope"])
def test_frequencies_of_a_longer_request_are_noticed(family: str) -> None:
    model = build_model(family)
    document, query = request_ids(34, 3)
    short = run_reference(model, document, query, hosts=2, anchor_length=8)
    longer = run_reference(model, document, query, hosts=2, anchor_length=8, num_new_tokens=60)
    again = run_reference(model, document, query, hosts=2, anchor_length=8)
    assert largest_difference(short.logits, longer.logits) > 10 * TOLERANCE
    assert torch.equal(short.logits, again.logits)


def test_who_sees_whom_in_a_case_written_by_hand() -> None:
    document, query = request_ids(7, 2)
    run = run_reference(
        build_model("llama"), document, query, hosts=2, anchor_length=3, passing_length=1, compressor="recent"
    )
    # Blocks are [0, 1, 2] and [3, 4, 5, 6]. The anchor is d0 q0 q1, so document tokens 1 and 2 may be passed; 2 is.
    assert run.layout.ids.tolist() == torch.cat([document[:, :1], query, document, query], dim=1).tolist()
    assert run.layout.position.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert run.kept[0] == [[[2], [6]]] * 2
    rows = [
        "100 0000000 00",
        "110 0000000 00",
        "111 0000000 00",
        "000 1000000 00",
        "000 1100000 00",
        "000 1110000 00",
        "111 0011000 00",
        "111 0011100 00",
        "111 0011110 00",
        "111 0011111 00",
        "000 1111111 10",
        "000 1111111 11",
    ]
    expected = [[mark == "1" for mark in row.replace(" ", "")] for row in rows]
    assert run.masks[0].tolist() == [expected, expected]


def test_heads_and_layers_select_differently() -> None:
    document, query = request_ids(80, 4)
    run = run_reference(build_model("llama"), document, query, hosts=4, anchor_length=8, passing_length=4)
    assert len({str(of_head) for of_layer in run.kept for of_head in of_layer}) == 6


SETTINGS = [
    # n, q, given, anchor, embedded, passing, exact
    (131072, 50, {}, 4096, 50, 2048, False),
    (32768, 50, {}, 1024, 50, 512, False),
    (524288, 50, {}, 8192, 50, 8192, False),
    (800, 40, {}, 41, 40, 13, False),
    (800, 40, {"query_position": 24}, 64, 40, 13, False),
    (800, 40, {"query_in_anchor": False}, 25, 0, 13, False),
    (800, 99, {}, 100, 99, 13, False),
    (800, 100, {}, 0, 0, 800, True),
    (800, 40, {"hosts": 1, "anchor_length": 3}, 0, 0, 800, True),
    (800, 40, {"anchor_length": 101}, 0, 0, 800, True),
    (801, 40, {"anchor_length": 101}, 101, 40, 13, False),
    (801, 40, {"anchor_length": "block"}, 100, 40, 13, False),
    (5, 3, {"anchor_length": 0}, 0, 0, 1, False),
    (5, 3, {"anchor_length": "block"}, 0, 0, 1, False),
    (5, 3, {"anchor_length": 2}, 0, 0, 5, True),
    (800, 40, {"anchor_length": 0, "compression_ratio": 3}, 0, 0, 34, False),
    (800, 40, {"anchor_length": 50, "passing_length": 700}, 50, 40, 700, False),
    (803, 40, STAR, 100, 0, 0, False),
    (800, None, {}, 25, 0, 13, False),
]


@pytest.mark.parametrize("n, q, given, anchor, embedded, passing, exact", SETTINGS)
def test_settings(
    n: int, q: int | None, given: dict[str, Any], anchor: int, embedded: int, passing: int, exact: bool
) -> None:
    settings = resolve_settings(n, q, **given)
    assert (settings.anchor_length, settings.embedded_length) == (anchor, embedded)
    assert (settings.passing_length, settings.exact) == (passing, exact)
    assert [p for host in range(settings.hosts) for p in settings.block(host)] == list(range(n))


@pytest.mark.parametrize(
    "given",
    [
        {"anchor_length": 40},
        {"anchor_length": 45, "query_position": 6},
        {"passing_length": 4, "compression_ratio": 8},
        {"compression_ratio": 0.5},
        {"compressor": "query", "query_in_anchor": False},
        {"compressor": "query", "anchor_length": 0},
    ],
)
def test_settings_that_are_errors(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        resolve_settings(800, 40, **given)


def test_greedy_tokens_of_an_exact_request_are_those_of_generate() -> None:
    model: Any = build_model("qwen2")
    document, query = request_ids(40, 4)
    tokens = reference_greedy(model, document, query, 6, hosts=4, anchor_length=0, passing_length=10)
    ids = torch.cat([document, query], dim=1)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert tokens.tolist() == plain[:, ids.shape[1] :].tolist()
