"""Attention kernels: numerics on CPU, the choice among them, and adapters of packages that need not be installed."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, library

from apb_ds.config import KERNELS as names
from apb_ds.ops import kernels
from apb_ds.ops.kernels import KERNELS, KernelChoice, check_kernel_name, choose_kernels, flash_attn, pieces
from apb_ds.ops.kernels.base import Kernel, fold_heads, unfold_heads
from apb_ds.ops.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel
from apb_ds.ops.kernels.pieces import Logits
from apb_ds.ops.kernels.reference import ReferenceKernel
from apb_ds.ops.kernels.torch_kernels import CPUFlashKernel, TorchCudnnKernel, TorchFlashKernel
from tests.kernel_cases import (
    CAPS,
    LAST,
    LSE_TOLERANCE,
    OUTPUT_TOLERANCE,
    SHAPES,
    SLOTS,
    WINDOWS,
    Shape,
    Slots,
    call_reference,
    check_kernel,
    check_last,
    check_shape,
    check_slots,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ON_CPU = [ReferenceKernel, CPUFlashKernel]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class PiecesKernel(Kernel):
    """The plain torch that kernels share, for every call."""

    name = "pieces"
    has_window = True
    has_softcap = True

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        return pieces.attend_in_pieces(query, key, value, logits)


@pytest.mark.parametrize("shape", [*SHAPES, *WINDOWS, *CAPS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel", [*ON_CPU, PiecesKernel])
def test_numbers(kernel: type[Kernel], shape: Shape) -> None:
    for dtype in DTYPES:
        check_shape(kernel(), shape, dtype)


SMALL = [shape for shape in (*SHAPES, *WINDOWS, *CAPS) if shape.queries * shape.keys < 5000]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
@pytest.mark.parametrize("queries, logits", [(1, 1), (5, 700)])
def test_small_pieces(monkeypatch: pytest.MonkeyPatch, shape: Shape, queries: int, logits: int) -> None:
    """Tiles of which a window hides all from some queries."""
    monkeypatch.setattr(pieces, "MAX_QUERIES", queries)
    monkeypatch.setattr(pieces, "MASKED_QUERIES", queries)
    monkeypatch.setattr(pieces, "MAX_LOGITS", logits)
    check_shape(PiecesKernel(), shape, torch.float32)
    check_shape(CPUFlashKernel(), shape, torch.float32)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_the_callers_scale_is_used(kernel: type[Kernel]) -> None:
    shape = SHAPES[1]
    check_kernel(kernel(), shape.draw(torch.float32), shape.causal, 0.3)


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("causal, options", [(True, {}), (False, {}), (True, {"window": 5}), (True, {"softcap": 2.0})])
def test_strided_and_sliced_inputs(kernel: type[Kernel], causal: bool, options: dict[str, Any]) -> None:
    """As models pass them: the projection transposes heads and tokens; blocks and cache buffers are sliced."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 50, 6, 64, generator=generator).transpose(1, 2)[:, :, 7:40]
    key, value = torch.randn(2, 1, 2, 90, 64, generator=generator)[:, :, :, 20:53]
    assert not (query.is_contiguous() or key.is_contiguous() or value.is_contiguous())
    check_kernel(kernel(), (query, key, value), causal, 0.125, **options)


# (number of keys, window), and the first key that is seen
FIRST_KEYS = [(1, None, 0), (5, None, 0), (40, None, 0), (1, 1, 0), (5, 3, 2), (40, 40, 0), (40, 1, 39), (23, 99, 0)]


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("num_keys, window, first", FIRST_KEYS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_first_keys_of_buffers(
    kernel: type[Kernel], num_keys: int, window: int | None, first: int, softcap: float | None
) -> None:
    query, key, value = Shape("", 4, 2, 1, 40, False).draw(torch.float32)
    count = torch.tensor([num_keys], dtype=torch.int32)
    got = kernel().attend_first(query, key, value, count, 0.3, window=window, softcap=softcap)
    seen = slice(first, num_keys)
    expected = kernel()(query, key[:, :, seen], value[:, :, seen], False, 0.3, softcap=softcap)
    assert all(torch.equal(ours, others) for ours, others in zip(got, expected, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ON_CPU)
def test_several_sequences_in_one_call(kernel: type[Kernel], causal: bool) -> None:
    parts = [Shape("", 4, 2, 12, 12, causal).draw(torch.float32) for _ in range(3)]
    scaled = [[states * (number + 1) for states in part] for number, part in enumerate(parts)]
    output, lse = kernel()(*(torch.cat(states) for states in zip(*scaled, strict=True)), causal, 0.3)
    for number, part in enumerate(scaled):
        expected, expected_lse = kernel()(*part, causal, 0.3)
        torch.testing.assert_close(output[number], expected[0], rtol=0, atol=OUTPUT_TOLERANCE[torch.float32])
        torch.testing.assert_close(lse[number], expected_lse[0], rtol=0, atol=LSE_TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", SLOTS, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel", [*ON_CPU, PiecesKernel])
def test_slots(kernel: type[Kernel], case: Slots) -> None:
    for dtype in DTYPES:
        check_slots(kernel(), case, dtype)


@pytest.mark.parametrize("num_last", LAST.values(), ids=LAST)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kernel", [CPUFlashKernel, PiecesKernel])
def test_the_last_keys(
    monkeypatch: pytest.MonkeyPatch, kernel: type[Kernel], softcap: float | None, num_last: tuple[int, ...]
) -> None:
    for dtype in DTYPES:
        check_last(kernel(), num_last, dtype, softcap)
    monkeypatch.setattr(pieces, "MAX_QUERIES", 2)
    monkeypatch.setattr(pieces, "MAX_LOGITS", 700)
    check_last(kernel(), num_last, torch.float32, softcap)


@pytest.mark.parametrize(
    "slots, num_keys, window, calls",
    [
        ((4, 5, 6, 7), (199, 150, 3, 200), None, 1),
        ((4, 1, 2, 0), (99, 50, 70, 100), None, 1),
        ((0, 11), (60, 60), None, 2),
        ((0, 1, 2, 3), (9, 1, 1000, 2), None, 4),
        ((0, 1, 2, 3), (980, 1000, 999, 990), 16, 1),
    ],
)
def test_slots_are_read_where_they_are_in_few_calls(
    monkeypatch: pytest.MonkeyPatch,
    slots: tuple[int, ...],
    num_keys: tuple[int, ...],
    window: int | None,
    calls: int,
) -> None:
    """On CPU, where copying keys takes longer than attention does."""
    query, key, value, *where = Slots("", slots, num_keys, capacity=1000).draw(torch.float32)
    kernel, calls_made = CPUFlashKernel(), []
    attend = kernel._call

    def record(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls_made.append((key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()))
        return attend(query, key, value, *arguments, **options)

    monkeypatch.setattr(kernel, "_call", record)
    kernel.attend_slots(query, key, value, *where, 0.1, window=window)
    assert calls_made == [(key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr())] * calls


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("queries", [1, 5])
def test_folded_heads(kernel: type[Kernel], queries: int) -> None:
    query, key, value = Shape("", 6, 2, queries, 40, False).draw(torch.float32)
    folded = fold_heads(query, 2)
    assert folded.shape == (1, 2, 3 * queries, 64)
    got = unfold_heads(*kernel()(folded, key, value, False, 0.3), 6)
    torch.testing.assert_close(got, kernel()(query, key, value, False, 0.3))


@pytest.mark.parametrize("queries, window, softcap", [(5, None, None), (5, 2, None), (3, 2, None), (5, None, 0.7)])
def test_the_reference_matches_the_definition_of_attention(
    queries: int, window: int | None, softcap: float | None
) -> None:
    query, key, value = Shape("", 4, 2, queries, 5, True, 8).draw(torch.float64)
    output, lse = ReferenceKernel()(query, key, value, True, 0.4, window=window, softcap=softcap)
    for head in range(4):
        for token in range(queries):
            place = 5 - queries + token
            seen = [other for other in range(5) if other <= place and (window is None or other > place - window)]
            logits = torch.stack([query[0, head, token] @ key[0, head // 2, other] for other in seen]) * 0.4
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            weights = logits.exp() / logits.exp().sum()
            expected = sum(weight * value[0, head // 2, other] for weight, other in zip(weights, seen, strict=True))
            torch.testing.assert_close(output[0, head, token], expected)
            torch.testing.assert_close(lse[0, head, token].double(), logits.exp().sum().log(), rtol=0, atol=1e-6)


def test_the_tolerance_detects_a_missing_key() -> None:
    query, key, value = SHAPES[0].draw(torch.bfloat16)
    good = call_reference(query, key, value, False, 0.125)[0]
    fewer = call_reference(query, key[:, :, 1:], value[:, :, 1:], False, 0.125)[0]
    assert float((good - fewer).abs().max()) > 5 * OUTPUT_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("shape", WINDOWS, ids=lambda shape: shape.name)
def test_the_tolerance_detects_a_window_that_is_off_by_one(shape: Shape) -> None:
    states = shape.draw(torch.bfloat16)
    assert shape.window is not None
    good = call_reference(*states, True, shape.scale, window=shape.window)[1]
    for window in (shape.window - 1, shape.window + 1):
        if window > 0 and min(window, shape.window) < shape.keys:  # else both see every key
            moved = call_reference(*states, True, shape.scale, window=window)[1]
            assert float((good - moved).abs().max()) > 5 * LSE_TOLERANCE[torch.bfloat16]


def test_the_tolerance_detects_a_cap_that_is_missing_or_wrong() -> None:
    shape = CAPS[0]
    states = shape.draw(torch.bfloat16)
    good, uncapped, inverted, after_scale = (
        call_reference(*states, True, scale, softcap=softcap)[0]
        for scale, softcap in [(shape.scale, 5.0), (shape.scale, None), (shape.scale, 0.2), (shape.scale / 5, 1.0)]
    )
    for wrong in (uncapped, inverted, after_scale):
        assert float((good - wrong).abs().max()) > 5 * OUTPUT_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("options", [{"window": 64}, {"window": 64, "softcap": 5.0}, {"softcap": 5.0}])
@pytest.mark.parametrize("kernel", [CPUFlashKernel, PiecesKernel])
def test_scratch_does_not_grow_with_the_square_of_the_tokens(kernel: type[Kernel], options: dict[str, Any]) -> None:
    tokens = 8192
    query, key, value = Shape("", 2, 1, tokens, tokens, True, 8).draw(torch.float32)
    with torch.profiler.profile(profile_memory=True) as profiler:
        kernel()(query, key, value, True, 0.3, **options)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    square = 2 * tokens * tokens * query.element_size()  # 512 MiB
    assert 0 < max(accumulate(changes)) < square / 8


@pytest.mark.parametrize(
    "queries, causal, options, named",
    [
        (9, False, {"window": 3}, "window=3 needs causal=True"),
        (31, True, {"window": 3}, "31 queries <= 30 keys"),
        (30, True, {"window": 0}, "window=0"),
        (30, True, {"window": -1}, "window=-1"),
        (30, True, {"softcap": 0.0}, "softcap=0.0"),
        (30, True, {"softcap": float("nan")}, "softcap=nan"),
        (9, True, {}, "without a window"),
    ],
)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_a_mask_that_does_not_fit(
    kernel: type[Kernel], queries: int, causal: bool, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        kernel()(*Shape("", 4, 2, queries, 30, causal, 8).draw(torch.float32), causal, 1.0, **options)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "kernel, options, lacking",
    [
        (TorchCudnnKernel, {"window": 3}, "window"),
        (TorchCudnnKernel, {"softcap": 3.0}, "softcap"),
        (TorchFlashKernel, {"softcap": 3.0}, "softcap"),
        (TorchFlashKernel, {"window": 3, "softcap": 3.0}, "softcap"),
    ],
)
def test_a_kernel_refuses_what_it_lacks(kernel: type[Kernel], options: dict[str, Any], lacking: str) -> None:
    query, key, value = Shape("", 4, 2, 1, 30, True).draw(torch.bfloat16)
    count = torch.tensor([30], dtype=torch.int32)
    for call in (
        lambda: kernel()(query, key, value, True, 1.0, **({"window": 30} | options)),
        lambda: kernel().attend_first(query, key, value, count, 1.0, **options),
        lambda: kernel().attend_slots(query, key, value, count.long() - 30, count, 1.0, **options),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert repr(kernel.name) in str(caught.value) and f"({lacking})" in str(caught.value)


def test_kernels_in_ranges_pass_everything_on() -> None:
    kernel = CPUFlashKernel()
    ranged = KernelChoice(kernel, kernel).in_ranges().prefill
    assert (ranged.name, ranged.has_window, ranged.has_softcap) == ("cpu_flash", True, True)
    check_shape(ranged, CAPS[-3], torch.float32)
    query, key, value = Shape("", 4, 2, 1, 40, False).draw(torch.float32)
    several = query.expand(-1, -1, 3, -1)
    got, expected = (each.attend_all(several, key, value, 0.3, softcap=2.0)[0] for each in (ranged, kernel))
    assert torch.equal(got, expected)
    count = torch.tensor([30], dtype=torch.int32)
    got, expected = (
        each.attend_first(query, key, value, count, 0.3, window=4, softcap=2.0)[0] for each in (ranged, kernel)
    )
    assert torch.equal(got, expected)
    check_slots(ranged, SLOTS[-1], torch.float32)
    check_last(ranged, LAST["any"], torch.float32, 5.0)


# --- choosing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that flash-attn packages are installed, and that the GPU has a given compute capability."""

    def pretend(flash_attn2: bool = False, flash_attn3: bool = False, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(FlashAttn2Kernel, "is_installed", classmethod(lambda cls: flash_attn2))
        monkeypatch.setattr(FlashAttn3Kernel, "is_installed", classmethod(lambda cls: flash_attn3))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def test_auto_on_cpu() -> None:
    for dtype in DTYPES:
        assert choose_kernels("auto", CPU, dtype, 64).names == {"prefill": "cpu_flash", "decode": "cpu_flash"}
    assert choose_kernels("auto", torch.device("meta"), torch.float32, 64).names["prefill"] == "reference"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "installed, capability, dtype, head_dim, prefill, decode",
    [
        ((False, False), (9, 0), BF16, 128, "torch_cudnn", "torch_flash"),
        ((True, False), (9, 0), BF16, 128, "torch_cudnn", "torch_flash"),
        ((True, True), (9, 0), BF16, 128, "flash_attn3", "torch_flash"),
        ((False, True), (9, 0), BF16, 128, "flash_attn3", "torch_flash"),
        ((True, True), (9, 0), FP16, 128, "torch_cudnn", "torch_flash"),
        ((True, True), (8, 0), BF16, 128, "torch_cudnn", "torch_flash"),
        ((True, True), (10, 0), BF16, 128, "torch_cudnn", "torch_flash"),
        ((True, False), (9, 0), BF16, 256, "flash_attn2", "torch_flash"),
        ((False, False), (9, 0), BF16, 256, "torch_flash", "torch_flash"),
        ((False, False), (9, 0), BF16, 100, "torch_efficient", "torch_efficient"),
        ((True, True), (9, 0), FP32, 128, "torch_efficient", "torch_efficient"),
        ((True, True), (9, 0), torch.float64, 128, "reference", "reference"),
    ],
)
def test_auto_on_cuda(
    fake: Callable[..., None],
    installed: tuple[bool, bool],
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    prefill: str,
    decode: str,
) -> None:
    fake(*installed, capability)
    assert choose_kernels("auto", CUDA, dtype, head_dim).names == {"prefill": prefill, "decode": decode}


@pytest.mark.parametrize(
    "installed, dtype, head_dim, asked, prefill, decode, recorded",
    [
        ((False, False), BF16, 128, "window", "torch_flash", "torch_flash", "torch_flash"),
        ((True, False), BF16, 128, "window", "flash_attn2", "torch_flash", "torch_flash"),
        ((True, True), BF16, 128, "window", "flash_attn3", "torch_flash", "flash_attn3"),
        ((False, False), BF16, 512, "window", "torch_efficient", "torch_efficient", None),
        ((False, False), FP32, 128, "window", "torch_efficient", "torch_efficient", None),
        ((False, False), torch.float64, 128, "window", "reference", "reference", None),
        ((False, False), BF16, 128, "softcap", "torch_efficient", "torch_efficient", None),
        ((True, False), BF16, 128, "softcap", "flash_attn2", "flash_attn2", None),
        ((False, True), BF16, 128, "softcap", "flash_attn3", "flash_attn3", "flash_attn3"),
        ((True, True), BF16, 256, "window softcap", "flash_attn3", "flash_attn2", "flash_attn3"),
        ((True, True), FP16, 256, "window softcap", "flash_attn2", "flash_attn2", None),
    ],
)
def test_auto_on_cuda_with_windows_and_caps(
    fake: Callable[..., None],
    installed: tuple[bool, bool],
    dtype: torch.dtype,
    head_dim: int,
    asked: str,
    prefill: str,
    decode: str,
    recorded: str | None,
) -> None:
    fake(*installed)
    choice = choose_kernels("auto", CUDA, dtype, head_dim, **dict.fromkeys(asked.split(), True))
    assert choice.names == {"prefill": prefill, "decode": decode}
    assert (choice.recorded and choice.recorded.name) == recorded


@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("meta")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_never_fails(fake: Callable[..., None], device: torch.device, dtype: torch.dtype) -> None:
    fake()
    for head_dim in (64, 100, 512):
        choice = choose_kernels("auto", device, dtype, head_dim, window=True, softcap=True)
        assert all(kernel.has_window and kernel.has_softcap for kernel in (choice.prefill, choice.decode))


@pytest.mark.parametrize(
    "name, asked, lacking, others",
    [
        ("torch_cudnn", ["window"], "(window)", "one of: flash_attn2, torch_flash, torch_efficient, reference."),
        ("torch_cudnn", ["window", "softcap"], "(window) and", "one of: flash_attn2, torch_efficient, reference."),
        ("torch_flash", ["softcap"], "(softcap)", "one of: flash_attn2, torch_efficient, reference."),
    ],
)
def test_a_named_kernel_without_windows_or_caps(
    fake: Callable[..., None], name: str, asked: list[str], lacking: str, others: str
) -> None:
    fake(flash_attn2=True)
    with pytest.raises(ValueError) as caught:
        choose_kernels(name, CUDA, BF16, 128, **dict.fromkeys(asked, True))
    message = str(caught.value)
    assert f"kernel={name!r}" in message and lacking in message and others in message


def test_by_name() -> None:
    choice = choose_kernels("reference", CPU, torch.float32, 64)
    assert choice.names == {"prefill": "reference", "decode": "reference"}
    assert set(KERNELS) == {
        "reference", "cpu_flash", "torch_cudnn", "torch_flash", "torch_efficient", "flash_attn2", "flash_attn3",
    }  # fmt: skip
    assert all(KERNELS[name].name == name for name in KERNELS)
    assert names == ("auto", *KERNELS), "what APBConfig checks"


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError) as caught:
        choose_kernels("cpu_flsh", CPU, torch.float32, 64)
    message = str(caught.value)
    assert "kernel='cpu_flsh'" in message and "Did you mean 'cpu_flash'?" in message
    assert all(name in message for name in ("auto", *KERNELS))


@pytest.mark.parametrize(
    "name, package, extra",
    [("flash_attn2", "flash_attn", "apb_ds[flash]"), ("flash_attn3", "flash_attn_interface", "fa3-fwd")],
)
def test_a_kernel_that_is_not_installed(fake: Callable[..., None], name: str, package: str, extra: str) -> None:
    fake()
    for ask in (lambda: check_kernel_name(name), lambda: choose_kernels(name, CPU, torch.float32, 64)):
        with pytest.raises(RuntimeError) as caught:
            ask()
        assert f"kernel={name!r}" in str(caught.value) and package in str(caught.value) and extra in str(caught.value)


@pytest.mark.parametrize(
    "name, device, dtype, head_dim, capability, reason",
    [
        ("torch_flash", CPU, BF16, 64, (9, 0), "runs on cuda, not on cpu"),
        ("flash_attn2", CPU, BF16, 64, (9, 0), "runs on cuda, not on cpu"),
        ("cpu_flash", CUDA, FP32, 64, (9, 0), "runs on cpu, not on cuda"),
        ("torch_cudnn", CUDA, FP32, 64, (9, 0), "not torch.float32"),
        ("flash_attn2", CUDA, FP32, 64, (9, 0), "not torch.float32"),
        ("flash_attn3", CUDA, FP16, 64, (9, 0), "not torch.float16"),
        ("torch_cudnn", CUDA, BF16, 256, (9, 0), "up to 128"),
        ("torch_flash", CUDA, BF16, 100, (9, 0), "steps of 8, not 100"),
        ("flash_attn3", CUDA, BF16, 128, (8, 0), "Hopper"),
    ],
)
def test_a_kernel_that_does_not_fit(
    fake: Callable[..., None],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    reason: str,
) -> None:
    fake(True, True, capability)
    with pytest.raises(ValueError) as caught:
        choose_kernels(name, device, dtype, head_dim)
    assert f"kernel={name!r}" in str(caught.value) and reason in str(caught.value) and "auto" in str(caught.value)


# --- the flash-attn packages, replaced by stubs with their signatures ------------------------------------------------


def attend_tokens_first(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window_size: tuple[int, int], softcap: float
) -> tuple[Tensor, Tensor]:
    """Compute what a flash-attn function does, in its layout: (batch, tokens, heads, head_dim)."""
    for states in (q, k, v):
        if states.dim() != 4 or states.stride(-1) != 1:
            raise RuntimeError("input tensors must be four-dimensional with a contiguous last dimension")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise RuntimeError("the number of query heads must be a multiple of that of keys and values")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("only fp16 and bf16 are supported")
    groups = q.shape[2] // k.shape[2]
    keys, values = (states.double().repeat_interleave(groups, dim=2) for states in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) * scale
    if softcap > 0:
        logits = (logits / softcap).tanh() * softcap
    # As the packages document it: from place - left to place + right, both included; -1 is no bound.
    left, right = window_size[0], 0 if causal else window_size[1]
    distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]).unsqueeze(1)
    if left >= 0:
        logits = logits.masked_fill(distance < -left, -torch.inf)
    if right >= 0:
        logits = logits.masked_fill(distance > right, -torch.inf)
    output = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), values)
    return output.to(q.dtype).contiguous(), logits.logsumexp(dim=-1).float()


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (dropout_p, alibi_slopes) == (0.0, None)
    output, lse = attend_tokens_first(q, k, v, causal, softmax_scale, window_size, softcap)
    return (output, lse, None) if return_attn_probs else output


def flash_attn_3_always(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0,
):  # fmt: skip
    return attend_tokens_first(q, k, v, causal, softmax_scale, window_size, softcap)


def flash_attn_3_when_asked(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    output, lse = attend_tokens_first(q, k, v, causal, softmax_scale, window_size, softcap)
    return (output, lse) if return_attn_probs else output


def attend_with_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None, cache_batch_idx: Tensor | None,
    empty: float, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute what a function with a cache does; `empty` is its log-sum-exp of no keys."""
    if cache_seqlens is None:
        assert cache_batch_idx is None
        cache_seqlens = torch.full((len(q),), k_cache.shape[1], dtype=torch.int32)
    batch = cache_batch_idx if cache_batch_idx is not None else torch.arange(len(q), dtype=torch.int32)
    for indices in (cache_seqlens, batch):
        assert indices.dtype == torch.int32 and indices.shape == q.shape[:1]
    output, lse = torch.zeros_like(q), torch.full((len(q), q.shape[2], q.shape[1]), empty)
    for row, (slot, stop) in enumerate(zip(batch.tolist(), cache_seqlens.tolist(), strict=True)):
        if stop:
            k, v = (states[slot : slot + 1, :stop] for states in (k_cache, v_cache))
            output[row : row + 1], lse[row : row + 1] = attend_tokens_first(q[row : row + 1], k, v, *options)
    return output, lse


def flash_attn_2_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    output, lse = attend_with_cache(
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, torch.inf, causal, softmax_scale, window_size, softcap
    )
    return (output, lse) if return_softmax_lse else output


def flash_attn_3_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    output, lse = attend_with_cache(
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, -torch.inf, causal, softmax_scale, window_size, softcap
    )
    return (output, lse, None, None) if return_softmax_lse else output


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a stub module, and one that says how it was built."""

    def put(name: str, function: Any, flags: dict[str, bool] | None = None) -> None:
        with_kvcache = flash_attn_2_with_kvcache if name == "flash_attn" else flash_attn_3_with_kvcache
        put_module(name, flash_attn_func=function, flash_attn_with_kvcache=with_kvcache)
        if flags is not None:
            put_module(flash_attn.FLASH_ATTN_3_BUILDS[name], CONFIG={"build_flags": flags})
        forget()

    def put_module(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    def forget() -> None:
        flash_attn._flash_attn_3.cache_clear()
        flash_attn._flash_attn_3_build.cache_clear()
        flash_attn._flash_attn_3_operator.cache_clear()
        flash_attn._flash_attn_3_with_cache.cache_clear()

    yield put
    forget()


ADAPTERS = [
    (FlashAttn2Kernel, "flash_attn", flash_attn_2),
    (FlashAttn3Kernel, "flash_attn_interface", flash_attn_3_always),
    (FlashAttn3Kernel, "flash_attn_interface", flash_attn_3_when_asked),
    (FlashAttn3Kernel, "fa3_fwd_interface", flash_attn_3_always),
    (FlashAttn3Kernel, "fa3_fwd_interface", flash_attn_3_when_asked),
]


@pytest.mark.parametrize("shape", [*SHAPES, *WINDOWS, *CAPS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel, module, function", ADAPTERS)
def test_adapters(install: Callable[..., None], kernel: type[Kernel], module: str, function: Any, shape: Shape) -> None:
    install(module, function)
    assert kernel.is_installed()
    for dtype in kernel.dtypes or ():
        check_shape(kernel(), shape, dtype)


@pytest.mark.parametrize("case", SLOTS, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel, module, function", ADAPTERS[:2])
def test_adapters_with_slots(
    install: Callable[..., None], kernel: type[Kernel], module: str, function: Any, case: Slots
) -> None:
    install(module, function)
    check_slots(kernel(), case, torch.bfloat16)


@pytest.mark.parametrize("kernel, module, function", ADAPTERS)
def test_the_stubs_reject_the_other_layout(kernel: type[Kernel], module: str, function: Any) -> None:
    query, key, value = Shape("", 6, 2, 5, 9, False, 8).draw(torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiple"):
        function(query, key, value, softmax_scale=1.0)


FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, float softcap = 0.0, int num_splits = 0)"
)


@pytest.fixture
def register(install: Callable[..., None]) -> Iterator[Callable[[str, str], list[int]]]:
    """Register a stub of a package's operator; return the list that collects each call's `num_splits`."""
    fragments = []

    def put(namespace: str, schema: str) -> list[int]:
        calls: list[int] = []

        def forward(
            q, k, v, k_new=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
            softcap=0.0, num_splits=0, **others,
        ):  # fmt: skip
            calls.append(num_splits)
            assert all(states.stride(-1) == 1 for states in (q, k, v))
            window_size = (window_size_left, window_size_right)
            output, lse = attend_tokens_first(q, k, v, is_causal, softmax_scale, window_size, softcap)
            return output, lse, q.new_empty(0), q.new_empty(0)

        fragment = library.Library(namespace, "FRAGMENT")
        fragment.define(f"{schema} -> (Tensor, Tensor, Tensor, Tensor)")
        fragment.impl("fwd", forward, "CPU")
        fragments.append(fragment)
        return calls

    yield put
    for fragment in fragments:
        fragment._destroy()


@pytest.mark.skipif(FlashAttn3Kernel.is_installed(), reason="the real operator is registered")
@pytest.mark.parametrize(
    "module, namespace", [("flash_attn_interface", "flash_attn_3"), ("fa3_fwd_interface", "fa3_fwd")]
)
def test_flash_attn_3_calls_the_operator_directly(
    install: Callable[..., None], register: Callable[[str, str], list[int]], module: str, namespace: str
) -> None:
    calls = register(namespace, FORWARD)
    install(module, None)  # its function is not called
    shapes = [*SHAPES, *WINDOWS, *CAPS]
    for shape in shapes:
        check_shape(FlashAttn3Kernel(), shape, torch.bfloat16)
    assert calls == [1] * len(calls) and len(calls) >= len(shapes)
    query, key, value = SHAPES[1].draw(torch.bfloat16)
    odd = [states.transpose(2, 3).contiguous().transpose(2, 3) for states in (query, key, value)]
    torch.testing.assert_close(FlashAttn3Kernel()(*odd, True, 0.11), FlashAttn3Kernel()(query, key, value, True, 0.11))


@pytest.mark.skipif(FlashAttn3Kernel.is_installed(), reason="the real operator is registered")
@pytest.mark.parametrize(
    "schema",
    ["fwd(Tensor q, Tensor k, Tensor v, float? softmax_scale = None)", FORWARD.replace("? k_new = None", " k_new")],
)
def test_flash_attn_3_does_not_call_an_unknown_operator(
    install: Callable[..., None], register: Callable[[str, str], list[int]], schema: str
) -> None:
    calls = register("fa3_fwd", schema)
    install("fa3_fwd_interface", flash_attn_3_when_asked)
    check_kernel(FlashAttn3Kernel(), SHAPES[1].draw(torch.bfloat16), True, 0.2)
    assert not calls


def test_flash_attn_3_prefers_the_package_over_the_wheel(install: Callable[..., None]) -> None:
    install("fa3_fwd_interface", None)
    install("flash_attn_interface", flash_attn_3_always)
    check_kernel(FlashAttn3Kernel(), SHAPES[1].draw(torch.bfloat16), True, 0.2)


@pytest.mark.parametrize("num_keys, window, first", FIRST_KEYS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flash_attn_3_with_the_first_keys_of_buffers(
    install: Callable[..., None], num_keys: int, window: int | None, first: int, softcap: float | None
) -> None:
    install("fa3_fwd_interface", flash_attn_3_when_asked)
    query, key, value = Shape("", 4, 2, 1, 40, False).draw(torch.bfloat16)
    count = torch.tensor([num_keys], dtype=torch.int32)
    output, lse = FlashAttn3Kernel().attend_first(query, key, value, count, 0.2, window=window, softcap=softcap)
    seen = slice(first, num_keys)
    expected, expected_lse = call_reference(query, key[:, :, seen], value[:, :, seen], False, 0.2, softcap=softcap)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=OUTPUT_TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(lse, expected_lse.float(), rtol=0, atol=LSE_TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flash_attn_3_splits_the_keys_of_few_queries(install: Callable[..., None], softcap: float | None) -> None:
    """With the function that takes a cache: the other one would leave most of the device idle."""
    install("fa3_fwd_interface", None)
    query, key, value = Shape("", 4, 2, 5, 40, False).draw(torch.bfloat16)
    output, lse = FlashAttn3Kernel().attend_all(query, key, value, 0.2, softcap=softcap)
    expected, expected_lse = call_reference(query, key, value, False, 0.2, softcap=softcap)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=OUTPUT_TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(lse, expected_lse.float(), rtol=0, atol=LSE_TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("module", ["flash_attn_interface", "fa3_fwd_interface"])
@pytest.mark.parametrize("no_local, no_softcap", [(True, False), (False, True), (False, False)])
def test_flash_attn_3_has_what_it_was_built_with(
    install: Callable[..., None], fake: Callable[..., None], module: str, no_local: bool, no_softcap: bool
) -> None:
    fake(flash_attn3=True)
    flags = {"FLASHATTENTION_DISABLE_LOCAL": no_local, "FLASHATTENTION_DISABLE_SOFTCAP": no_softcap}
    install(module, flash_attn_3_always, flags)
    assert (FlashAttn3Kernel.has_window, FlashAttn3Kernel.has_softcap) == (not no_local, not no_softcap)
    for asked, is_missing in (({"window": True}, no_local), ({"softcap": True}, no_softcap)):
        reason = FlashAttn3Kernel.why_not(CUDA, BF16, 128, **asked)
        assert (reason is not None) == is_missing
        assert reason is None or (next(iter(asked)) in reason and f"as {module} was built" in reason)


def test_flash_attn_3_missing_at_the_call() -> None:
    if FlashAttn3Kernel.is_installed():
        pytest.skip("FlashAttention 3 is installed")
    with pytest.raises(RuntimeError, match="fa3-fwd"):
        FlashAttn3Kernel()(*SHAPES[0].draw(torch.bfloat16), True, 0.2)


def test_both_orders_end_with_a_kernel_that_supports_everything() -> None:
    for order in (kernels.PREFILL_ORDER, kernels.DECODE_ORDER):
        assert set(order) <= set(KERNELS.values()) and order[-1] is ReferenceKernel
