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
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        """Capped logits are several times larger than the cap."""
        return self.head_dim**-0.5 if self.softcap is None else 1.0

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

WINDOWS = [
    Shape("window 1", 4, 2, 33, 33, True, window=1),
    Shape("window 7", 6, 2, 65, 65, True, window=7),
    Shape("window of all but one", 4, 4, 48, 48, True, window=47),
    Shape("window of all", 4, 2, 40, 40, True, window=40),
    Shape("window of more than all", 4, 2, 40, 40, True, window=100),
    Shape("halo and a block", 4, 2, 17, 36, True, window=20),
    Shape("more than the halo", 4, 1, 17, 130, True, 80, window=20),
    Shape("less than the halo", 4, 2, 17, 30, True, window=20),
    Shape("new tokens, window of more than all", 4, 2, 17, 130, True, window=500),
    Shape("new tokens, window 1", 4, 2, 17, 130, True, window=1),
    Shape("one query, window 64", 4, 2, 1, 301, True, window=64),
    Shape("one query, window 1", 4, 2, 1, 301, True, window=1),
    Shape("one query, window of more than all", 4, 2, 1, 30, True, window=31),
    Shape("several pieces", 4, 2, 600, 750, True, 32, window=150),
]
CAPS = [
    Shape("capped, causal", 6, 2, 65, 65, True, softcap=5.0),
    Shape("capped, more keys than queries", 4, 1, 17, 130, False, softcap=5.0),
    Shape("capped, one query", 4, 2, 1, 301, False, softcap=5.0),
    Shape("capped, one token", 4, 2, 1, 1, True, softcap=5.0),
    Shape("capped, several pieces", 4, 2, 600, 600, True, 32, softcap=5.0),
    Shape("capped, window 7", 6, 2, 65, 65, True, softcap=5.0, window=7),
    Shape("capped, new tokens", 4, 2, 17, 130, True, softcap=5.0, window=20),
    Shape("capped, new tokens, window of more than all", 4, 2, 17, 130, True, softcap=5.0, window=200),
    Shape("capped, one query, window 64", 4, 2, 1, 301, True, softcap=5.0, window=64),
]

LONG_SHAPES = [
    Shape("prefill, causal", 32, 8, 1500, 1500, True, 128),
    Shape("prefill, unmasked", 32, 8, 700, 1900, False, 128),
    Shape("query", 32, 8, 26, 3001, False, 128),
    Shape("decode", 32, 8, 1, 8191, False, 128),
]
LONG_WINDOWS = [
    Shape("prefill, window", 32, 8, 1500, 1500, True, 128, window=1024),
    Shape("block behind its halo", 8, 4, 700, 1211, True, 256, window=512),
    Shape("query, window", 32, 8, 26, 3001, True, 128, window=1024),
    Shape("decode, window", 64, 8, 1, 8191, True, window=128),
]
LONG_CAPS = [
    Shape("capped, prefill", 16, 8, 1500, 1500, True, 128, softcap=5.0),
    Shape("capped, passed blocks", 8, 4, 700, 1900, False, 256, softcap=5.0),
    Shape("capped, decode", 16, 8, 1, 8191, False, 128, softcap=5.0),
    Shape("capped, prefill, window", 16, 8, 1500, 1500, True, 128, softcap=5.0, window=1024),
]


def call_reference(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Run the float64 reference on a kernel's inputs; its output stays in float64."""
    return ReferenceKernel()(query.double(), key.double(), value.double(), causal, scale, **options)


def check_shape(kernel: Any, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that a kernel computes what the reference does for a shape."""
    options = {"window": shape.window, "softcap": shape.softcap}
    check_kernel(kernel, shape.draw(dtype, device), shape.causal, shape.scale, **options)


def check_kernel(
    kernel: Any, states: tuple[Tensor, Tensor, Tensor], causal: bool, scale: float, **options: Any
) -> None:
    """Assert that output and log-sum-exp match the reference and have the right shape, dtype and device."""
    query = states[0]
    output, lse = kernel(*states, causal, scale, **options)
    expected, expected_lse = call_reference(*states, causal, scale, **options)
    assert output.shape == query.shape and output.dtype == query.dtype and output.device == query.device
    assert lse.shape == query.shape[:3] and lse.dtype == torch.float32 and lse.device == query.device
    # Kernels for half precision may take tanh from the GPU's approximation, within 2**-11; values are about 1.
    tanh = (options.get("softcap") or 0.0) * 2**-11 if query.dtype in (torch.float16, torch.bfloat16) else 0.0
    assert float((output.double() - expected).abs().max()) < OUTPUT_TOLERANCE[query.dtype] + 2 * tanh
    assert float((lse - expected_lse).abs().max()) < LSE_TOLERANCE[query.dtype] + tanh
