"""Shapes that every kernel is tested on, and the tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apb_ds.ops.kernels.reference import ReferenceKernel

# Absolute, for values drawn from a normal distribution (outputs up to about 4, log-sum-exps up to about 8).
# float32: sums have at most a few thousand terms; 1e-5 is about a hundred roundings.
# Half precision: weights and products are rounded to 8 (bfloat16) or 11 bits before they are summed, then the output
# is rounded. One rounding of a number near 4 is 2**-7 or 2**-10; the tolerance allows two.
OUTPUT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The log-sum-exp is accumulated and returned in float32 from exact inputs.
LSE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Shape:
    """The shape of one kernel call."""

    name: str
    heads: int
    kv_heads: int
    queries: int
    keys: int
    causal: bool
    head_dim: int = 64

    def draw(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, drawn on the CPU so that every device gets the same."""
        generator = torch.Generator().manual_seed(self.queries * 1000 + self.keys)
        sizes = [(self.heads, self.queries), (self.kv_heads, self.keys), (self.kv_heads, self.keys)]
        states = [torch.randn(1, heads, tokens, self.head_dim, generator=generator) for heads, tokens in sizes]
        query, key, value = (states_of.to(device=device, dtype=dtype) for states_of in states)
        return query, key, value


SHAPES = [
    Shape("square causal", 4, 4, 48, 48, True),
    Shape("square causal, grouped", 6, 2, 65, 65, True),
    Shape("square causal, one KV head", 4, 1, 33, 33, True),
    Shape("square causal, one token", 4, 2, 1, 1, True),
    Shape("square, unmasked", 4, 2, 40, 40, False),
    Shape("more keys than queries", 4, 2, 17, 130, False),
    Shape("more queries than keys", 4, 2, 130, 17, False),
    Shape("one query", 4, 2, 1, 301, False),
    Shape("one key", 4, 2, 19, 1, False),
    Shape("three queries", 6, 2, 3, 301, False),
    Shape("head_dim 128", 4, 2, 20, 70, False, 128),
    Shape("head_dim 80", 4, 2, 37, 37, True, 80),
]

LONG_SHAPES = [
    Shape("prefill, causal", 32, 8, 1500, 1500, True, 128),
    Shape("prefill, unmasked", 32, 8, 700, 1900, False, 128),
    Shape("query", 32, 8, 26, 3001, False, 128),
    Shape("decode", 32, 8, 1, 8191, False, 128),
]


def call_reference(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Run the float64 reference on a kernel's inputs; its output stays in float64."""
    return ReferenceKernel()(query.double(), key.double(), value.double(), causal, scale)


def check_kernel(kernel: Any, states: tuple[Tensor, Tensor, Tensor], causal: bool, scale: float) -> None:
    """Assert that output and log-sum-exp match the reference and have the right shape, dtype and device."""
    query = states[0]
    output, lse = kernel(*states, causal, scale)
    expected, expected_lse = call_reference(*states, causal, scale)
    assert output.shape == query.shape and output.dtype == query.dtype and output.device == query.device
    assert lse.shape == query.shape[:3] and lse.dtype == torch.float32 and lse.device == query.device
    assert float((output.double() - expected).abs().max()) < OUTPUT_TOLERANCE[query.dtype]
    assert float((lse - expected_lse).abs().max()) < LSE_TOLERANCE[query.dtype]
