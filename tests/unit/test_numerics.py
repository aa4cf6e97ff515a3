"""Numbers at the edges, in half precision too, against the float64 reference: huge logits, ties, blocks of one token.

Queries and keys are whole numbers times a power of two. So every logit is exact in float32, however large, and what the
reference says in float64 is what a kernel must say: nothing is left to the rounding of a logit of a million, which
alone would move a softmax by a factor.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import apb_ds
from apb_ds.attention import APBAttention, Phase
from apb_ds.cache import ShardedCache
from apb_ds.compressors.base import compressor_names, needs_heads
from apb_ds.methods.state import PrefillState
from apb_ds.ops.kernels import KERNELS
from apb_ds.ops.merge import merge_many, merge_two
from apb_ds.utils.sizes import LayerAttention
from tests.engine_cases import engine_random_scores
from tests.kernel_cases import OUTPUT_TOLERANCE
from tests.models import build_model, distinct_ids, request_ids
from tests.reference import ReferenceRun, _MaskedAttention, lay_out, resolve_settings, run_reference

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
UNTRAINED = [name for name in compressor_names() if not needs_heads(name)]
SCALE = 0.25
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of each query and key; logits are up to 16 * 8 * 8 * SCALE times the square of it.
SIZES = (2.0**-6, 1.0, 2.0**6, 2.0**12)


def whole_numbers(heads: int, tokens: int, size: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-8, 9, (1, heads, tokens, HEAD_DIM), generator=generator)
    return (drawn * size).to(dtype)


def draw(tokens: int, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of a sequence, as a layer has them."""
    query, key = whole_numbers(HEADS, tokens, size, dtype, 1), whole_numbers(KV_HEADS, tokens, size, dtype, 2)
    value = torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(3)).to(dtype)
    return query, key, value


def judged(states: tuple[Tensor, ...], document: Tensor, query: Tensor, given: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return the reference's output of one layer, (1, heads, tokens, head_dim), for [anchor | document | query]."""
    settings = resolve_settings(document.shape[1], None, **given)
    run = ReferenceRun(lay_out(settings, document, query, None))
    scorer = engine_random_scores if given.get("compressor") == "random" else None
    attend = _MaskedAttention(run, scorer, None)
    output, _ = attend(SimpleNamespace(layer_idx=0), *states, None, SCALE)
    return output.transpose(1, 2), run


def served(states: tuple[Tensor, ...], n: int, q: int, given: dict[str, Any]) -> Tensor:
    """Return the same from `APBAttention`: rounds, then the query at once, then its last token once more alone."""
    config = apb_ds.APBConfig(**given)
    attention = APBAttention(config)
    plan = apb_ds.plan_request(config, n, 0)
    _, heads, _, head_dim = states[0].shape
    layer = LayerAttention(heads, states[1].shape[1], head_dim, head_dim)
    cache = ShardedCache([layer] * 2, 0, 1, n)  # the last layer's output is used by nobody, so there are two
    state = PrefillState(plan, cache)
    length = plan.anchor_length
    output = torch.full_like(states[0], torch.nan)

    def part(*spans: tuple[int, int]) -> list[Tensor]:
        return [torch.cat([tensor[:, :, slice(*span)] for span in spans], dim=2) for tensor in states]

    for state.round_index in range(len(plan.rounds)):
        anchor = state.anchor_share
        ((start, stop),) = (plan.blocks[host] for host in state.hosts)
        block = (length + start, length + stop)
        if anchor[1] == anchor[0] and start == stop:
            continue
        for layer in range(2):
            given_out = attention(*part(anchor, block), phase=Phase.PREFILL, layer_idx=layer, state=state, scale=SCALE)
            if layer == 0:
                output[:, :, slice(*anchor)] = given_out[:, :, : anchor[1] - anchor[0]]
                output[:, :, slice(*block)] = given_out[:, :, anchor[1] - anchor[0] :]
    cache.set_length(n)
    first = length + n
    for span, phase in (((first, first + q - 1), Phase.QUERY), ((first + q - 1, first + q), Phase.DECODE)):
        if span[0] == span[1]:
            continue
        new_query, new_key, new_value = part(span)
        keys, values = cache.update(new_key, new_value, 0)
        cache.update(new_key, new_value, 1)
        output[:, :, slice(*span)] = attention(new_query, keys, values, phase=phase, layer_idx=0, scale=SCALE)
    return output


def compare(n: int, q: int, size: float, dtype: torch.dtype, edit: Any = None, **given: Any) -> Any:
    given = {"query_in_anchor": False, **given}
    document, query = torch.arange(n).unsqueeze(0), torch.arange(q).unsqueeze(0)
    length = resolve_settings(n, None, **given).anchor_length
    states = draw(length + n + q, size, dtype)
    # The anchor is the document's start once more, at the same positions.
    for tensor in states:
        tensor[:, :, :length] = tensor[:, :, length : 2 * length]
    if edit is not None:
        edit(*states)
    expected, run = judged(states, document, query, given)
    actual = served(states, n, q, given)
    assert actual.dtype == dtype
    assert bool(actual.isfinite().all())
    assert float((actual.double() - expected.double()).abs().max()) <= OUTPUT_TOLERANCE[dtype]
    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "n, q, given",
    [
        (67, 4, {"hosts": 4, "anchor_length": 6, "passing_length": 3}),
        (67, 4, {"hosts": 4, "anchor_length": 0, "passing_length": 17}),
        (67, 4, {"hosts": 4, "anchor_length": 6, "passing_length": 0}),
        (8, 3, {"hosts": 8, "anchor_length": 1, "passing_length": 1}),
        (8, 1, {"hosts": 8, "anchor_length": 0, "passing_length": 1}),
        (3, 2, {"hosts": 8, "anchor_length": 0, "passing_length": 1}),
        (1, 1, {"hosts": 16, "anchor_length": 1, "passing_length": 1}),
        (20, 3, {"hosts": 1}),
    ],
    ids=str,
)
def test_huge_logits(n: int, q: int, given: dict[str, Any], size: float, dtype: torch.dtype) -> None:
    """Up to some ten thousand millions: no row overflows, none vanishes, small blocks and empty ones included."""
    compare(n, q, size, dtype, compressor="recent", **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compressor", [name for name in UNTRAINED if name != "query"])
def test_tokens_that_are_all_the_same(compressor: str, dtype: torch.dtype) -> None:
    """Every score is tied, and the earliest are kept; every weight is the same."""

    def repeat(query: Tensor, key: Tensor, value: Tensor) -> None:
        query[:], key[:] = query[:, :, :1].clone(), key[:, :, :1].clone()

    given = {"hosts": 4, "anchor_length": 6, "passing_length": 3, "compressor": compressor}
    run = compare(67, 4, 1.0, dtype, repeat, **given)
    if compressor in ("knorm", "keydiff"):
        assert run.kept[0][0][1] == [16, 17, 18]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compressor", ["knorm", "keydiff", "window"])
def test_two_kinds_of_tokens(compressor: str, dtype: torch.dtype) -> None:
    """Ties across blocks and at the threshold: a third of the tokens of a block is of one kind."""

    def alternate(query: Tensor, key: Tensor, value: Tensor) -> None:
        for tensor in (query, key):
            tensor[:] = tensor[:, :, (torch.arange(tensor.shape[2]) % 3).clamp(max=1)]

    given = {"hosts": 4, "anchor_length": 6, "passing_length": 5, "compressor": compressor}
    compare(64, 4, 2.0**-4, dtype, alternate, **given)


@pytest.mark.parametrize("compressor", [name for name in UNTRAINED if name != "query"])
def test_keys_without_a_direction(compressor: str) -> None:
    """Keys of zero have no cosine; they are scored all the same, and nothing is NaN."""
    states = draw(67 + 4, 1.0, torch.float32)
    states[1][:, :, ::3] = 0.0
    states[1][:, :, 16:33] = 0.0  # a whole block
    output = served(states, 67, 4, {"hosts": 4, "anchor_length": 0, "passing_length": 3, "compressor": compressor})
    assert bool(output.isfinite().all())


def test_the_comparison_would_notice() -> None:
    """A logit that was scaled twice."""
    states = draw(67 + 4, 2.0**-4, torch.float32)
    given = {"hosts": 4, "anchor_length": 0, "passing_length": 17, "compressor": "recent", "query_in_anchor": False}
    expected, _ = judged(states, torch.arange(67).unsqueeze(0), torch.arange(4).unsqueeze(0), given)
    wrong = served((states[0] * SCALE, *states[1:]), 67, 4, given)
    assert float((wrong - expected).abs().max()) > 100 * OUTPUT_TOLERANCE[torch.float32]


# --- kernels and merges


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.device_type in (None, "cpu")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("queries, keys, causal", [(40, 40, True), (1, 1, True), (7, 90, False), (1, 33, False)])
def test_kernels(name: str, dtype: torch.dtype, size: float, queries: int, keys: int, causal: bool) -> None:
    kernel, reference = KERNELS[name](), KERNELS["reference"]()
    query, key, value = draw(keys, size, dtype)
    query = query[:, :, :queries]
    output, lse = kernel(query, key, value, causal, SCALE)
    expected, expected_lse = reference(query.double(), key.double(), value.double(), causal, SCALE)
    assert float((output.double() - expected).abs().max()) <= OUTPUT_TOLERANCE[dtype]
    # The number's own last place in float32; in half precision weights are rounded before they are summed.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-4
    assert float(((lse - expected_lse).abs() / (1 + expected_lse.abs())).max()) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4, 1e9, -1e30, 3e38])
def test_merging_the_largest_numbers(dtype: torch.dtype, shift: float) -> None:
    """Values at the end of their dtype's range, of either sign: an average of them is never beyond it."""
    largest = min(torch.finfo(dtype).max, 1.5e38)  # beyond half of float32's largest a difference overflows
    outs = torch.tensor([largest, -largest, largest]).to(dtype).view(3, 1, 1, 1, 1).expand(3, 1, 1, 2, 4)
    lses = torch.full((3, 1, 1, 2), shift)
    for merged, expected in (
        (merge_two(outs[0], lses[0], outs[2], lses[2]), largest),
        (merge_two(outs[0], lses[0], outs[1], lses[1]), 0.0),
        (merge_two(outs[0], lses[0], outs[1], lses[1] - torch.inf), largest),
        (merge_two(outs[1], lses[1] - torch.inf, outs[0], lses[0]), largest),
        (merge_many(outs[[0, 2]], lses[:2]).to(dtype), largest),
        (merge_many(outs, lses).to(dtype), largest / 3),
    ):
        assert bool(merged.isfinite().all())
        torch.testing.assert_close(merged.double(), torch.full_like(merged, expected).double(), rtol=1e-2, atol=1e-2)


# --- whole models


def half_engine(model: Any, **given: Any) -> Any:
    """Return an engine on the CPU, as on processors for which DeepSpeed refuses float16."""
    supported = [torch.float32, torch.bfloat16]
    with mock.patch.object(type(get_accelerator()), "supported_dtypes", return_value=supported):
        return apb_ds.init_inference(model, apb_ds.APBConfig(**given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compressor", UNTRAINED)
def test_half_precision_models(compressor: str, dtype: torch.dtype) -> None:
    """Attention that is far sharper than a trained model's: finite, and the tokens of a repeated run."""
    model = build_model("llama").to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(60)
    engine = half_engine(model, hosts=4, passing_length=4, compressor=compressor)
    document, query = request_ids(101, 5)
    for ids in (document, document[:, :1].expand(1, 101), document[:, :3], document[:, :1]):
        logits = engine.query_logits(query, context=engine.prefill(ids, query))
        assert logits.dtype == torch.float32 and bool(logits.isfinite().all())
        tokens = engine.generate(ids, query, max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, engine.generate(ids, query, max_new_tokens=4, do_sample=False))


# Of a logit, in the dtype's own last places: weights and activations are rounded to 8 or 11 bits in three layers. What
# a token more or less makes is ten times that, as the second half of the test shows.
HALF_TOLERANCE = {torch.bfloat16: 0.5, torch.float16: 0.06}


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision_against_the_reference(dtype: torch.dtype) -> None:
    """Chosen by position, so that no rounding of a score decides."""
    given: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5, "compressor": "recent"}
    document, query = distinct_ids(150), distinct_ids(6, seed=1)
    engine = half_engine(build_model("llama").to(dtype), **given)
    actual = engine.query_logits(query, context=engine.prefill(document, query))
    expected = run_reference(build_model("llama").to(dtype), document, query, **given).logits.float()
    assert float((actual - expected).abs().max()) < HALF_TOLERANCE[dtype]
    other = run_reference(build_model("llama").to(dtype), document, query, **{**given, "passing_length": 1}).logits
    assert float((actual - other.float()).abs().max()) > 2 * HALF_TOLERANCE[dtype]
