"""Every CUDA kernel that is installed, on the same inputs as those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apb_ds.ops.kernels import DECODE_ORDER, KERNELS, PREFILL_ORDER, choose_kernels
from apb_ds.ops.kernels.base import Kernel
from apb_ds.ops.kernels.reference import ReferenceKernel
from tests.kernel_cases import (
    CAPS,
    LAST,
    LONG_CAPS,
    LONG_SHAPES,
    LONG_WINDOWS,
    LSE_TOLERANCE,
    OUTPUT_TOLERANCE,
    SHAPES,
    SLOTS,
    WINDOWS,
    Shape,
    Slots,
    check_kernel,
    check_last,
    check_results,
    check_shape,
    check_slots,
    expected_of_last,
    expected_of_slots,
)

pytestmark = pytest.mark.gpu

ON_CUDA = [ReferenceKernel, *(kernel for kernel in PREFILL_ORDER if kernel.device_type == "cuda")]
CASES = [
    pytest.param(kernel, dtype, id=f"{kernel.name}-{str(dtype).removeprefix('torch.')}")
    for kernel in ON_CUDA
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if kernel.dtypes is None or dtype in kernel.dtypes
]


def require(
    kernel: type[Kernel], dtype: torch.dtype, head_dim: int, window: bool = False, softcap: bool = False
) -> Kernel:
    """Return the kernel, or skip the test and say what is missing."""
    if not kernel.is_installed():
        pytest.skip(f"missing: the package {kernel.package} ({kernel.extra})")
    reason = kernel.why_not(torch.device("cuda", 0), dtype, head_dim, window=window, softcap=softcap)
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    return kernel()


@pytest.mark.parametrize("shape", [*SHAPES, *WINDOWS, *CAPS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_numbers(kernel: type[Kernel], dtype: torch.dtype, shape: Shape) -> None:
    attend = require(kernel, dtype, shape.head_dim, shape.window is not None, shape.softcap is not None)
    check_shape(attend, shape, dtype, "cuda")


@pytest.mark.parametrize("shape", [*LONG_SHAPES, *LONG_WINDOWS, *LONG_CAPS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_numbers_of_prefill_and_decode(kernel: type[Kernel], dtype: torch.dtype, shape: Shape) -> None:
    """The heads of real models, and lengths that no tile divides."""
    attend = require(kernel, dtype, shape.head_dim, shape.window is not None, shape.softcap is not None)
    check_shape(attend, shape, dtype, "cuda")


@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 21)])
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_strided_and_sliced_inputs(kernel: type[Kernel], dtype: torch.dtype, causal: bool, window: int | None) -> None:
    """As they come: heads and tokens transposed by the projection, tokens sliced from a block or a cache buffer."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(1, 150, 6, 64, generator=generator).to("cuda", dtype)
    buffers = torch.randn(2, 1, 2, 290, 64, generator=generator).to("cuda", dtype)
    key, value = buffers[:, :, :, 20:153]
    states = (projected.transpose(1, 2)[:, :, 7:140], key, value)
    assert not any(tensor.is_contiguous() for tensor in states)
    check_kernel(require(kernel, dtype, 64, window is not None), states, causal, 0.125, window=window)


@pytest.mark.parametrize("window, softcap", [(None, None), (1, None), (100, None), (1024, None), (100, 5.0)])
@pytest.mark.parametrize("num_keys", [1, 130, 1000, 2048])
@pytest.mark.parametrize("kernel, dtype", [case for case in CASES if case.values[0].can_be_recorded])
def test_the_first_keys_of_buffers_in_a_graph(
    kernel: type[Kernel], dtype: torch.dtype, num_keys: int, window: int | None, softcap: float | None
) -> None:
    """Recorded with one number of keys and replayed with another: what counts is read on the device."""
    buffers = Shape("buffers", 32, 8, 1, 2048, False, 128)
    query, key, value = buffers.draw(dtype, "cuda")
    attend = require(kernel, dtype, 128, window is not None, softcap is not None)
    count = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    attend.attend_first(query, key, value, count, 0.1, window=window, softcap=softcap)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = attend.attend_first(query, key, value, count, 0.1, window=window, softcap=softcap)
    count.fill_(num_keys)
    graph.replay()
    seen = slice(0 if window is None else max(0, num_keys - window), num_keys)
    expected, expected_lse = ReferenceKernel()(query, key[:, :, seen], value[:, :, seen], False, 0.1, softcap=softcap)
    tanh = (softcap or 0.0) * 2**-11  # approximate on the GPU
    torch.testing.assert_close(output, expected, rtol=0, atol=OUTPUT_TOLERANCE[dtype] + 2 * tanh)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=LSE_TOLERANCE[dtype] + tanh)


@pytest.mark.parametrize("kernel, dtype", CASES)
def test_several_sequences_in_one_call(kernel: type[Kernel], dtype: torch.dtype) -> None:
    parts = [Shape("", 8, 2, 33, 33, True, 64).draw(dtype, "cuda") for _ in range(3)]
    scaled = [[states * (number + 1) for states in part] for number, part in enumerate(parts)]
    attend = require(kernel, dtype, 64)
    output, lse = attend(*(torch.cat(states) for states in zip(*scaled, strict=True)), True, 0.1)
    for number, part in enumerate(scaled):
        expected, expected_lse = ReferenceKernel()(*part, True, 0.1)
        torch.testing.assert_close(output[number], expected[0], rtol=0, atol=4 * OUTPUT_TOLERANCE[dtype])
        torch.testing.assert_close(lse[number], expected_lse[0], rtol=0, atol=4 * LSE_TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("heads, queries", [(8, 1), (8, 32), (8, 128), (32, 1), (32, 8), (32, 32)])
@pytest.mark.parametrize("kernel, dtype", [case for case in CASES if case.values[0].can_be_recorded])
def test_all_keys_of_few_queries_in_a_graph(
    kernel: type[Kernel], dtype: torch.dtype, heads: int, queries: int, softcap: float | None
) -> None:
    query, key, value = Shape("long", heads, 8, queries, 20_000, False, 128).draw(dtype, "cuda")
    attend = require(kernel, dtype, 128, softcap=softcap is not None)
    attend.attend_all(query, key, value, 0.1, softcap=softcap)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = attend.attend_all(query, key, value, 0.1, softcap=softcap)
    graph.replay()
    expected, expected_lse = ReferenceKernel()(query, key, value, False, 0.1, softcap=softcap)
    tanh = (softcap or 0.0) * 2**-11  # approximate on the GPU
    torch.testing.assert_close(output, expected, rtol=0, atol=OUTPUT_TOLERANCE[dtype] + 2 * tanh)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=LSE_TOLERANCE[dtype] + tanh)


LONG_SLOTS = [
    Slots("long slots", (7, 0, 3, 5, 2), (2048, 1, 0, 700, 1100), 32, 8, 128, num_slots=9, capacity=2048),
    Slots("long slots, window", (7, 0, 3, 5), (2048, 1, 0, 700), 8, 4, 256, 9, 2048, window=512),
]


@pytest.mark.parametrize("case", [*SLOTS, *LONG_SLOTS], ids=lambda case: case.name)
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_slots(kernel: type[Kernel], dtype: torch.dtype, case: Slots) -> None:
    attend = require(kernel, dtype, case.head_dim, case.window is not None, case.softcap is not None)
    check_slots(attend, case, dtype, "cuda")


@pytest.mark.parametrize("num_last", LAST.values(), ids=LAST)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_the_last_keys(
    kernel: type[Kernel], dtype: torch.dtype, softcap: float | None, num_last: tuple[int, ...]
) -> None:
    check_last(require(kernel, dtype, 64, softcap=softcap is not None), num_last, dtype, softcap, "cuda")


@pytest.mark.parametrize("case", LONG_SLOTS, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel, dtype", [case for case in CASES if case.values[0].can_be_recorded])
def test_slots_in_a_graph(kernel: type[Kernel], dtype: torch.dtype, case: Slots) -> None:
    """Recorded with some slots and numbers of keys, replayed with others."""
    attend = require(kernel, dtype, case.head_dim, case.window is not None)
    states = case.draw(dtype, "cuda")
    slots, num_keys = states[3:]
    slots.copy_(torch.arange(len(slots)))
    num_keys.fill_(7)
    attend.attend_slots(*states, case.scale, window=case.window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend.attend_slots(*states, case.scale, window=case.window)
    slots.copy_(torch.tensor(case.slots))
    num_keys.copy_(torch.tensor(case.num_keys))
    graph.replay()
    check_results(got, expected_of_slots(case, states), states[0])


@pytest.mark.parametrize("kernel, dtype", [case for case in CASES if case.values[0].can_be_recorded])
def test_the_last_keys_in_a_graph(kernel: type[Kernel], dtype: torch.dtype) -> None:
    attend = require(kernel, dtype, 128)
    query, key, value = Shape("", 32, 8, 5, 3000, False, 128).draw(dtype, "cuda")
    num_last = torch.full((5,), 7, dtype=torch.int32, device="cuda")
    attend.attend_last(query, key, value, num_last, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend.attend_last(query, key, value, num_last, 0.1)
    num_last.copy_(torch.tensor([0, 1, 2999, 5000, 128]))
    graph.replay()
    check_results(got, expected_of_last(query, key, value, num_last, 0.1), query)


@pytest.mark.parametrize("options", [{"window": 64}, {"window": 64, "softcap": 5.0}, {"softcap": 5.0}], ids=str)
def test_scratch_of_plain_torch(options: dict[str, Any]) -> None:
    """32K tokens of float32, for which no backend has windows: the matrix of logits would be 4 GiB a head."""
    query, key, value = Shape("", 2, 1, 2**15, 2**15, True, 8).draw(torch.float32, "cuda")
    kernel = choose_kernels("auto", query.device, query.dtype, 8, window="window" in options, softcap=True).prefill
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel(query, key, value, True, 0.3, **options)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**28


@pytest.mark.parametrize("asked", [[], ["window"], ["softcap"], ["window", "softcap"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_takes_a_cuda_kernel_before_the_reference(dtype: torch.dtype, asked: list[str]) -> None:
    device = torch.device("cuda", 0)
    options = dict.fromkeys(asked, True)
    choice = choose_kernels("auto", device, dtype, 128, **options)
    for kernel, order in ((choice.prefill, PREFILL_ORDER), (choice.decode, DECODE_ORDER)):
        fitting = [
            each.name for each in order if each.is_installed() and each.why_not(device, dtype, 128, **options) is None
        ]
        assert kernel.name == fitting[0] and KERNELS[kernel.name].device_type == "cuda"
