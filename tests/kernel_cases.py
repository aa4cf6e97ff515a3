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


@dataclass(frozen=True)
class Slots:
    """A call of `attend_slots`."""

    name: str
    slots: tuple[int, ...]
    num_keys: tuple[int, ...]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    num_slots: int = 12
    capacity: int = 70
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softcap is None else 1.0

    def draw(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return query, key, value, slots and numbers of keys."""
        generator = torch.Generator().manual_seed(sum(self.num_keys))
        query = torch.randn(len(self.slots), self.heads, 1, self.head_dim, generator=generator).to(device, dtype)
        size = (2, self.num_slots, self.capacity, self.kv_heads, self.head_dim)
        key, value = torch.randn(size, generator=generator).to(device, dtype).transpose(2, 3)
        slots = torch.tensor(self.slots, device=device)
        return query, key, value, slots, torch.tensor(self.num_keys, dtype=torch.int32, device=device)


SLOTS = [
    Slots("all rows alike", (0, 1, 2, 3), (33, 33, 33, 33)),
    Slots("one row", (5,), (9,), heads=4, kv_heads=4),
    Slots("later slots", (3, 4, 5, 6, 7, 8), (1, 70, 64, 2, 31, 69), heads=4, kv_heads=1),
    Slots("unsorted, with gaps", (7, 2, 4, 3, 9), (5, 70, 17, 1, 33), head_dim=128),
    Slots("far apart", (11, 0), (40, 7)),
    Slots("rows without keys", (2, 1, 0, 3), (0, 12, 0, 40)),
    Slots("no keys at all", (1, 0), (0, 0)),
    Slots("window 1", (0, 1, 2, 3), (20, 0, 1, 2), window=1),
    Slots("window 7", (6, 1, 2, 3), (20, 6, 7, 8), window=7),
    Slots("window 7, all longer", (0, 1, 2), (20, 70, 41), window=7),
    Slots("window of more than all", (2, 0, 1), (20, 6, 33), heads=4, window=50),
    Slots("capped", (4, 2, 1), (70, 0, 17), softcap=5.0),
    Slots("capped, window 7", (4, 2, 1), (70, 3, 17), softcap=5.0, window=7),
]
# For each query, how many of the last 70 keys it sees.
LAST = {
    "one query": (23,),
    "one query, all": (70,),
    "one query, none": (0,),
    "growing": tuple(range(60, 68)),
    "any": (5, 0, 70, 1, 1000, 33, 0),
    "alike": (12, 12, 12),
    "none": (0, 0, 0),
}


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
    got = kernel(*states, causal, scale, **options)
    expected = call_reference(*states, causal, scale, **options)
    check_results(got, (expected[0], expected[1].double()), states[0], options.get("softcap"))


def attend_seen(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attend in float64, each query to the keys that `seen`, (queries, keys), names; 0 and minus infinity if none."""
    group = query.shape[1] // key.shape[1]
    keys, values = (states.double().repeat_interleave(group, dim=1) for states in (key, value))
    logits = query.double() @ keys.transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~seen, -torch.inf)
    return torch.nan_to_num(logits.softmax(dim=-1), nan=0.0) @ values, logits.logsumexp(dim=-1)


def expected_of_slots(case: Slots, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return what `attend_slots` should, in float64."""
    query, key, value, slots, num_keys = states
    place = torch.arange(case.capacity, device=query.device)
    results = []
    for row, (slot, stop) in enumerate(zip(slots.tolist(), num_keys.tolist(), strict=True)):
        seen = (place < stop) & (place >= (0 if case.window is None else stop - case.window))
        parts = (query[row : row + 1], key[slot : slot + 1], value[slot : slot + 1])
        results.append(attend_seen(*parts, seen.unsqueeze(0), case.scale, case.softcap))
    outputs, lses = zip(*results, strict=True)
    return torch.cat(outputs), torch.cat(lses)


def check_slots(kernel: Any, case: Slots, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that a kernel's `attend_slots` returns what the definition says."""
    states = case.draw(dtype, device)
    got = kernel.attend_slots(*states, case.scale, window=case.window, softcap=case.softcap)
    check_results(got, expected_of_slots(case, states), states[0], case.softcap)


def check_last(
    kernel: Any, num_last: tuple[int, ...], dtype: torch.dtype, softcap: float | None = None, device: str = "cpu"
) -> None:
    """Assert that a kernel's `attend_last` returns what the definition says."""
    query, key, value = Shape("", 6, 2, len(num_last), 70, False).draw(dtype, device)
    count = torch.tensor(num_last, dtype=torch.int32, device=device)
    got = kernel.attend_last(query, key, value, count, 0.2, softcap=softcap)
    check_results(got, expected_of_last(query, key, value, count, 0.2, softcap), query, softcap)


def expected_of_last(
    query: Tensor, key: Tensor, value: Tensor, num_last: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `attend_last` should, in float64."""
    keys = key.shape[2]
    seen = torch.arange(keys, device=query.device) >= keys - num_last.unsqueeze(1)
    return attend_seen(query, key, value, seen, scale, softcap)


def check_results(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], query: Tensor, softcap: float | None = None
) -> None:
    """Assert that output and log-sum-exp match and have the right shape, dtype and device."""
    output, lse = got
    assert output.shape == query.shape and output.dtype == query.dtype and output.device == query.device
    assert lse.shape == query.shape[:3] and lse.dtype == torch.float32 and lse.device == query.device
    # Kernels for half precision may take tanh from the GPU's approximation, within 2**-11; values are about 1.
    tanh = (softcap or 0.0) * 2**-11 if query.dtype in (torch.float16, torch.bfloat16) else 0.0
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=OUTPUT_TOLERANCE[query.dtype] + 2 * tanh)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=LSE_TOLERANCE[query.dtype] + tanh)
