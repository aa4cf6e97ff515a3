"""Merging and selection, compared with the obvious versions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from apb_ds.ops.merge import merge_many, merge_two
from apb_ds.ops.selection import gather_tokens, select_by_sorting, select_top

HEADS, TOKENS, HEAD_DIM = 3, 7, 8

# Partial outputs are rounded to their dtype, so the merged one can be off by about one unit in the last place of
# numbers up to 3 (2**-8 and 2**-11 of it); in float32, by the rounding of the log-sum-exp.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with one softmax in float64; without keys, output is 0 and log-sum-exp minus infinity."""
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1))
    return weights @ values, lse


def parts_and_whole(sizes: list[int], dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return partial outputs (in `dtype`) and log-sum-exps over key sets of these sizes, and the float64 whole."""
    logits = spread * draw(1, HEADS, TOKENS, sum(sizes))
    values = draw(1, HEADS, sum(sizes), HEAD_DIM, seed=1)
    parts = [
        attend(part, of_part)
        for part, of_part in zip(logits.split(sizes, dim=-1), values.split(sizes, dim=-2), strict=True)
    ]
    outs = torch.stack([out.to(dtype) for out, _ in parts])
    lses = torch.stack([lse.float() for _, lse in parts])
    return outs, lses, attend(logits, values)[0]


def assert_close(merged: Tensor, whole: Tensor, dtype: torch.dtype) -> None:
    assert merged.shape == whole.shape
    assert float((merged.double() - whole).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [[5, 9], [1, 40], [1, 1], [0, 6], [6, 0]], ids=str)
def test_merge_two_is_one_softmax(sizes: list[int], dtype: torch.dtype) -> None:
    outs, lses, whole = parts_and_whole(sizes, dtype)
    merged = merge_two(outs[0], lses[0], outs[1], lses[1])
    assert merged.dtype == dtype
    assert_close(merged, whole, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [[9], [5, 9], [3, 1, 4, 1, 5], [0, 4, 0, 3], [0, 6]], ids=str)
def test_merge_many_is_one_softmax(sizes: list[int], dtype: torch.dtype) -> None:
    outs, lses, whole = parts_and_whole(sizes, dtype)
    merged = merge_many(outs, lses)
    assert merged.dtype == torch.float32
    assert_close(merged, whole, dtype)


def test_the_tolerance_detects_a_merge_that_ignores_the_weights() -> None:
    outs, _, whole = parts_and_whole([5, 9], torch.bfloat16)
    equal_shares = merge_many(outs, torch.zeros(2, 1, HEADS, TOKENS))
    assert float((equal_shares.double() - whole).abs().max()) > 10 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("top", [1e4, -1e4, 88.0, -104.0])
def test_extreme_logits_do_not_overflow(top: float) -> None:
    """exp(88.8) overflows and exp(-104) vanishes in float32; only differences may be exponentiated."""
    outs, lses, whole = parts_and_whole([5, 9], torch.float32)
    # Shifting all logits only changes the rounding of the log-sum-exp: 1e-3 at 1e4.
    shifted = lses + top
    tolerance = 4 * 2.0**-24 * abs(top) * 3 + TOLERANCE[torch.float32]
    for merged in (merge_two(outs[0], shifted[0], outs[1], shifted[1]), merge_many(outs, shifted)):
        assert float((merged.double() - whole).abs().max()) < tolerance


@pytest.mark.parametrize("gap", [1e4, float(torch.finfo(torch.float32).max)])
def test_a_part_with_vanishing_weight_adds_nothing(gap: float) -> None:
    outs = draw(2, 1, HEADS, TOKENS, HEAD_DIM).float()
    high, low = torch.full((1, HEADS, TOKENS), gap), torch.full((1, HEADS, TOKENS), -gap)
    for first, second, expected in ((high, low, outs[0]), (low, high, outs[1])):
        assert torch.equal(merge_two(outs[0], first, outs[1], second), expected)
        assert torch.equal(merge_many(outs, torch.stack([first, second])), expected)


def test_rows_without_keys() -> None:
    """In turn: both parts saw keys, only the first, only the second, neither."""
    outs = draw(2, 1, 1, 4, HEAD_DIM).float()
    nothing = -torch.inf
    lses = torch.tensor([[[[1.0, 2.0, nothing, nothing]]], [[[1.0, nothing, 3.0, nothing]]]])
    outs = torch.where(lses.isneginf().unsqueeze(-1), 0.0, outs)
    expected = torch.stack([outs[:, 0, 0, 0].mean(dim=0), outs[0, 0, 0, 1], outs[1, 0, 0, 2], torch.zeros(HEAD_DIM)])
    for merged in (merge_two(outs[0], lses[0], outs[1], lses[1]), merge_many(outs, lses)):
        torch.testing.assert_close(merged[0, 0], expected, rtol=0, atol=1e-6)


def scores_of(kind: str, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randn(3, tokens, generator=generator)
    if kind == "constant":
        return torch.full((3, tokens), 0.25)
    if kind == "tied":
        return torch.randint(0, 3, (3, tokens), generator=generator).float()
    if kind == "some -inf":
        return scores.masked_fill(torch.rand(3, tokens, generator=generator) < 0.5, -torch.inf)
    if kind == "all -inf":
        return torch.full((3, tokens), -torch.inf)
    if kind == "some inf":
        return scores.masked_fill(torch.rand(3, tokens, generator=generator) < 0.3, torch.inf)
    if kind == "signed zeros":
        return torch.tensor([0.0, -0.0]).repeat(3, tokens)[:, :tokens]
    return scores


@pytest.mark.parametrize("kind", ["random", "constant", "tied", "some -inf", "all -inf", "some inf", "signed zeros"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 300])
def test_select_top_is_a_stable_sort(kind: str, tokens: int) -> None:
    scores = scores_of(kind, tokens)
    for count in sorted({0, 1, tokens // 3, tokens // 2, tokens - 1, tokens}):
        chosen = select_top(scores, count)
        assert chosen.dtype == torch.int64 and chosen.shape == (3, count)
        assert torch.equal(chosen, select_by_sorting(scores, count)), count


def test_select_top_on_small_examples() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 5.0]])
    assert select_top(scores, 4).tolist() == [[0, 1, 3, 5], [0, 1, 2, 5]]
    assert select_by_sorting(scores, 4).tolist() == [[0, 1, 3, 5], [0, 1, 2, 5]]


def test_gather_tokens_picks_per_head() -> None:
    states = draw(1, 2, 5, 3)
    indices = torch.tensor([[0, 4], [2, 3]])
    picked = gather_tokens(states, indices)
    assert picked.shape == (1, 2, 2, 3)
    for head in range(2):
        for slot in range(2):
            assert torch.equal(picked[0, head, slot], states[0, head, int(indices[head, slot])])
    assert gather_tokens(states, indices[:, :0]).shape == (1, 2, 0, 3)
    # A non-contiguous slice of a longer block, as a compressor passes it.
    assert torch.equal(
        gather_tokens(states[:, :, 1:], indices[:, :1]),
        states[:, :, 1:].contiguous()[:, [0, 1], indices[:, 0]][:, :, None],
    )


def test_a_long_query_is_merged_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, and as many messages as keep what is gathered below the limit."""
    from apb_ds.methods import decode

    class Group:
        world_size = 2

        def __init__(self) -> None:
            self.sizes: list[int] = []

        def all_gather(self, tensor: Tensor) -> Tensor:
            self.sizes.append(tensor.shape[2])
            return torch.stack([tensor, tensor * 0.5])

    generator = torch.Generator().manual_seed(0)
    output, lse = torch.randn(1, 2, 7, 4, generator=generator), torch.randn(1, 2, 7, generator=generator)
    whole = SimpleNamespace(group=Group())
    expected = decode.merge_ranks(whole, output, lse)
    monkeypatch.setattr(decode, "MAX_GATHERED_BYTES", 7 * 2 * 2 * 5 * 4)
    assert torch.equal(decode.merge_ranks(whole, output, lse), expected)
    assert whole.group.sizes == [7, 7]
    monkeypatch.setattr(decode, "MAX_GATHERED_BYTES", 3 * 2 * 2 * 5 * 4)
    pieces = SimpleNamespace(group=Group())
    merged = decode.merge_ranks(pieces, output, lse)
    assert pieces.group.sizes == [3, 3, 1] and torch.allclose(merged, expected, atol=1e-6)
