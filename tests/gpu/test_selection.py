"""Selection and gathering in one kernel each, held to the obvious versions."""

from __future__ import annotations

import pytest
import torch

from apb_ds.ops.selection import gather_tokens, select_by_sorting
from tests.unit.test_ops import scores_of

pytestmark = pytest.mark.gpu

KINDS = ["random", "constant", "tied", "some -inf", "all -inf", "some inf", "signed zeros"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 17, 300, 1024, 1025, 5000])
def test_select_top_is_a_stable_sort(kind: str, tokens: int) -> None:
    from apb_ds.ops import triton_selection

    scores = scores_of(kind, tokens)
    longer = torch.cat([scores, scores + 1], dim=1).cuda()  # rows that do not follow each other
    for count in sorted({1, max(1, tokens // 3), tokens - 1}):
        places = triton_selection.select_top(longer[:, :tokens], count, first=7)
        assert places.dtype == torch.int64
        assert torch.equal(places.cpu(), select_by_sorting(scores, count) + 7), count
        heads_last = scores.T.contiguous().T.cuda()
        assert torch.equal(triton_selection.select_top(heads_last, count, first=7), places), count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("count", [0, 1, 37, 64])
def test_gather_pair_copies_the_places(count: int, head_dim: int, dtype: torch.dtype) -> None:
    from apb_ds.ops import triton_selection

    generator = torch.Generator().manual_seed(count)
    projected = torch.randn(1, 90, 3, head_dim, generator=generator).to("cuda", dtype)
    buffer = torch.randn(1, 3, 100, head_dim, generator=generator).to("cuda", dtype)
    keys, values = projected.transpose(1, 2), buffer[:, :, 5:95]
    places = torch.stack([torch.randperm(90, generator=generator)[:count].sort().values for _ in range(3)]).cuda()
    longer = torch.full((2, 3, count + 9, head_dim), 7.0, dtype=dtype, device="cuda")
    triton_selection.gather_pair(keys, values, places, longer[:, :, 4 : 4 + count])
    assert torch.equal(longer[0:1, :, 4 : 4 + count], gather_tokens(keys, places))
    assert torch.equal(longer[1:2, :, 4 : 4 + count], gather_tokens(values, places))
    assert bool((longer[:, :, :4] == 7).all() and (longer[:, :, 4 + count :] == 7).all()), "nothing else is touched"
