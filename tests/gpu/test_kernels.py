"""Every CUDA kernel that is installed, on the same inputs as those of the CPU."""

from __future__ import annotations

import pytest
import torch

from apb_ds.ops.kernels import DECODE_ORDER, KERNELS, PREFILL_ORDER, choose_kernels
from apb_ds.ops.kernels.base import Kernel
from apb_ds.ops.kernels.reference import ReferenceKernel
from tests.kernel_cases import LONG_SHAPES, LSE_TOLERANCE, OUTPUT_TOLERANCE, SHAPES, Shape, check_kernel

pytestmark = pytest.mark.gpu

ON_CUDA = [ReferenceKernel, *(kernel for kernel in PREFILL_ORDER if kernel.device_type == "cuda")]
CASES = [
    pytest.param(kernel, dtype, id=f"{kernel.name}-{str(dtype).removeprefix('torch.')}")
    for kernel in ON_CUDA
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if kernel.dtypes is None or dtype in kernel.dtypes
]


def require(kernel: type[Kernel], dtype: torch.dtype, head_dim: int) -> Kernel:
    """Return the kernel, or skip the test and say what is missing."""
    if not kernel.is_installed():
        pytest.skip(f"missing: the package {kernel.package} ({kernel.extra})")
    reason = kernel.why_not(torch.device("cuda", 0), dtype, head_dim)
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    return kernel()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_numbers(kernel: type[Kernel], dtype: torch.dtype, shape: Shape) -> None:
    check_kernel(require(kernel, dtype, shape.head_dim), shape.draw(dtype, "cuda"), shape.causal, shape.head_dim**-0.5)


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_numbers_of_prefill_and_decode(kernel: type[Kernel], dtype: torch.dtype, shape: Shape) -> None:
    """A Llama's heads, and lengths that no tile divides."""
    check_kernel(require(kernel, dtype, shape.head_dim), shape.draw(dtype, "cuda"), shape.causal, shape.head_dim**-0.5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel, dtype", CASES)
def test_strided_and_sliced_inputs(kernel: type[Kernel], dtype: torch.dtype, causal: bool) -> None:
    """As they come: heads and tokens transposed by the projection, tokens sliced from a block or a cache buffer."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(1, 150, 6, 64, generator=generator).to("cuda", dtype)
    buffers = torch.randn(2, 1, 2, 290, 64, generator=generator).to("cuda", dtype)
    key, value = buffers[:, :, :, 20:153]
    states = (projected.transpose(1, 2)[:, :, 7:140], key, value)
    assert not any(tensor.is_contiguous() for tensor in states)
    check_kernel(require(kernel, dtype, 64), states, causal, 0.125)


@pytest.mark.parametrize("num_keys", [1, 130, 1000, 2048])
@pytest.mark.parametrize("kernel, dtype", [case for case in CASES if case.values[0].can_be_recorded])
def test_the_first_keys_of_buffers_in_a_graph(kernel: type[Kernel], dtype: torch.dtype, num_keys: int) -> None:
    """Recorded with one number of keys and replayed with another: what counts is read on the device."""
    buffers = Shape("buffers", 32, 8, 1, 2048, False, 128)
    query, key, value = buffers.draw(dtype, "cuda")
    attend = require(kernel, dtype, 128)
    count = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    attend.attend_first(query, key, value, count, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = attend.attend_first(query, key, value, count, 0.1)
    count.fill_(num_keys)
    graph.replay()
    expected, expected_lse = ReferenceKernel()(query, key[:, :, :num_keys], value[:, :, :num_keys], False, 0.1)
    torch.testing.assert_close(output, expected, rtol=0, atol=OUTPUT_TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=LSE_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_takes_a_cuda_kernel_before_the_reference(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    choice = choose_kernels("auto", device, dtype, 128)
    for kernel, order in ((choice.prefill, PREFILL_ORDER), (choice.decode, DECODE_ORDER)):
        fitting = [each.name for each in order if each.is_installed() and each.why_not(device, dtype, 128) is None]
        assert kernel.name == fitting[0] and KERNELS[kernel.name].device_type == "cuda"
