"""Attention kernels: numerics on CPU, the choice among them, and adapters of packages that need not be installed."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, library

from apb_ds.ops import kernels
from apb_ds.ops.kernels import KERNELS, check_kernel_name, choose_kernels, flash_attn
from apb_ds.ops.kernels.base import Kernel
from apb_ds.ops.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel
from apb_ds.ops.kernels.reference import ReferenceKernel
from apb_ds.ops.kernels.torch_kernels import CPUFlashKernel
from tests.kernel_cases import LSE_TOLERANCE, OUTPUT_TOLERANCE, SHAPES, Shape, call_reference, check_kernel

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ON_CPU = [ReferenceKernel, CPUFlashKernel]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_numbers(kernel: type[Kernel], dtype: torch.dtype, shape: Shape) -> None:
    check_kernel(kernel(), shape.draw(dtype), shape.causal, shape.head_dim**-0.5)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_the_callers_scale_is_used(kernel: type[Kernel]) -> None:
    shape = SHAPES[1]
    check_kernel(kernel(), shape.draw(torch.float32), shape.causal, 0.3)


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("causal", [True, False])
def test_strided_and_sliced_inputs(kernel: type[Kernel], causal: bool) -> None:
    """As models pass them: the projection transposes heads and tokens; blocks and cache buffers are sliced."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 50, 6, 64, generator=generator).transpose(1, 2)[:, :, 7:40]
    key, value = torch.randn(2, 1, 2, 90, 64, generator=generator)[:, :, :, 20:53]
    assert not (query.is_contiguous() or key.is_contiguous() or value.is_contiguous())
    check_kernel(kernel(), (query, key, value), causal, 0.125)


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("num_keys", [1, 5, 40])
def test_the_first_keys_of_buffers(kernel: type[Kernel], num_keys: int) -> None:
    query, key, value = Shape("", 4, 2, 1, 40, False).draw(torch.float32)
    count = torch.tensor([num_keys], dtype=torch.int32)
    got = kernel().attend_first(query, key, value, count, 0.3)
    expected = kernel()(query, key[:, :, :num_keys], value[:, :, :num_keys], False, 0.3)
    assert all(torch.equal(ours, others) for ours, others in zip(got, expected, strict=True))


def test_the_reference_matches_the_definition_of_attention() -> None:
    query, key, value = Shape("", 4, 2, 5, 5, True, 8).draw(torch.float64)
    output, lse = ReferenceKernel()(query, key, value, True, 0.4)
    for head in range(4):
        for token in range(5):
            logits = torch.stack([query[0, head, token] @ key[0, head // 2, other] for other in range(token + 1)]) * 0.4
            weights = logits.exp() / logits.exp().sum()
            expected = sum(weights[other] * value[0, head // 2, other] for other in range(token + 1))
            torch.testing.assert_close(output[0, head, token], expected)
            torch.testing.assert_close(lse[0, head, token].double(), logits.exp().sum().log(), rtol=0, atol=1e-6)


def test_the_tolerance_detects_a_missing_key() -> None:
    query, key, value = SHAPES[0].draw(torch.bfloat16)
    good = call_reference(query, key, value, False, 0.125)[0]
    fewer = call_reference(query, key[:, :, 1:], value[:, :, 1:], False, 0.125)[0]
    assert float((good - fewer).abs().max()) > 5 * OUTPUT_TOLERANCE[torch.bfloat16]


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


def test_by_name() -> None:
    choice = choose_kernels("reference", CPU, torch.float32, 64)
    assert choice.names == {"prefill": "reference", "decode": "reference"}
    assert set(KERNELS) == {
        "reference", "cpu_flash", "torch_cudnn", "torch_flash", "torch_efficient", "flash_attn2", "flash_attn3",
    }  # fmt: skip
    assert all(KERNELS[name].name == name for name in KERNELS)


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


def attend_tokens_first(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute what a flash-attn function does, in its layout: (batch, tokens, heads, head_dim)."""
    for states in (q, k, v):
        if states.dim() != 4 or states.stride(-1) != 1:
            raise RuntimeError("input tensors must be four-dimensional with a contiguous last dimension")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise RuntimeError("the number of query heads must be a multiple of that of keys and values")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("only fp16 and bf16 are supported")
    output, lse = ReferenceKernel()(*(states.transpose(1, 2) for states in (q, k, v)), causal, scale)
    return output.transpose(1, 2).contiguous(), lse


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
    output, lse = attend_tokens_first(q, k, v, causal, softmax_scale)
    return (output, lse, None) if return_attn_probs else output


def flash_attn_3_always(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0,
):  # fmt: skip
    return attend_tokens_first(q, k, v, causal, softmax_scale)


def flash_attn_3_when_asked(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    output, lse = attend_tokens_first(q, k, v, causal, softmax_scale)
    return (output, lse) if return_attn_probs else output


def flash_attn_3_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == q.shape[:1]
    stop = int(cache_seqlens)
    output, lse = attend_tokens_first(q, k_cache[:, :stop], v_cache[:, :stop], causal, softmax_scale)
    return (output, lse, None, None) if return_softmax_lse else output


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Install a stub module."""

    def put(name: str, function: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        module.flash_attn_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        forget()

    def forget() -> None:
        flash_attn._flash_attn_3.cache_clear()
        flash_attn._flash_attn_3_operator.cache_clear()

    yield put
    forget()


ADAPTERS = [
    (FlashAttn2Kernel, "flash_attn", flash_attn_2),
    (FlashAttn3Kernel, "flash_attn_interface", flash_attn_3_always),
    (FlashAttn3Kernel, "flash_attn_interface", flash_attn_3_when_asked),
    (FlashAttn3Kernel, "fa3_fwd_interface", flash_attn_3_always),
    (FlashAttn3Kernel, "fa3_fwd_interface", flash_attn_3_when_asked),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("kernel, module, function", ADAPTERS)
def test_adapters(
    install: Callable[[str, Any], None], kernel: type[Kernel], module: str, function: Any, shape: Shape
) -> None:
    install(module, function)
    assert kernel.is_installed()
    for dtype in kernel.dtypes or ():
        check_kernel(kernel(), shape.draw(dtype), shape.causal, 0.11)


@pytest.mark.parametrize("kernel, module, function", ADAPTERS)
def test_the_stubs_reject_the_other_layout(kernel: type[Kernel], module: str, function: Any) -> None:
    query, key, value = Shape("", 6, 2, 5, 9, False, 8).draw(torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiple"):
        function(query, key, value, softmax_scale=1.0)


FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new = None, float? softmax_scale = None, bool is_causal = False, "
    "int num_splits = 0)"
)


@pytest.fixture
def register(install: Callable[[str, Any], None]) -> Iterator[Callable[[str, str], list[int]]]:
    """Register a stub of a package's operator; return the list that collects each call's `num_splits`."""
    fragments = []

    def put(namespace: str, schema: str) -> list[int]:
        calls: list[int] = []

        def forward(q, k, v, k_new=None, softmax_scale=None, is_causal=False, num_splits=0, **others):  # type: ignore[no-untyped-def]
            calls.append(num_splits)
            assert all(states.stride(-1) == 1 for states in (q, k, v))
            output, lse = attend_tokens_first(q, k, v, is_causal, softmax_scale)
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
    install: Callable[[str, Any], None], register: Callable[[str, str], list[int]], module: str, namespace: str
) -> None:
    calls = register(namespace, FORWARD)
    install(module, None)  # its function is not called
    for shape in SHAPES:
        check_kernel(FlashAttn3Kernel(), shape.draw(torch.bfloat16), shape.causal, 0.11)
    assert calls == [1] * len(calls) and len(calls) >= len(SHAPES)
    query, key, value = SHAPES[1].draw(torch.bfloat16)
    odd = [states.transpose(2, 3).contiguous().transpose(2, 3) for states in (query, key, value)]
    torch.testing.assert_close(FlashAttn3Kernel()(*odd, True, 0.11), FlashAttn3Kernel()(query, key, value, True, 0.11))


@pytest.mark.skipif(FlashAttn3Kernel.is_installed(), reason="the real operator is registered")
@pytest.mark.parametrize(
    "schema",
    ["fwd(Tensor q, Tensor k, Tensor v, float? softmax_scale = None)", FORWARD.replace("? k_new = None", " k_new")],
)
def test_flash_attn_3_does_not_call_an_unknown_operator(
    install: Callable[[str, Any], None], register: Callable[[str, str], list[int]], schema: str
) -> None:
    calls = register("fa3_fwd", schema)
    install("fa3_fwd_interface", flash_attn_3_when_asked)
    check_kernel(FlashAttn3Kernel(), SHAPES[1].draw(torch.bfloat16), True, 0.2)
    assert not calls


def test_flash_attn_3_prefers_the_package_over_the_wheel(install: Callable[[str, Any], None]) -> None:
    install("fa3_fwd_interface", None)
    install("flash_attn_interface", flash_attn_3_always)
    check_kernel(FlashAttn3Kernel(), SHAPES[1].draw(torch.bfloat16), True, 0.2)


def test_flash_attn_3_with_the_first_keys_of_buffers(
    install: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("fa3_fwd_interface", flash_attn_3_when_asked)
    monkeypatch.setattr(
        sys.modules["fa3_fwd_interface"], "flash_attn_with_kvcache", flash_attn_3_with_kvcache, raising=False
    )
    query, key, value = Shape("", 4, 2, 1, 40, False).draw(torch.bfloat16)
    count = torch.tensor([23], dtype=torch.int32)
    output, lse = FlashAttn3Kernel().attend_first(query, key, value, count, 0.2)
    expected, expected_lse = call_reference(query, key[:, :, :23], value[:, :, :23], False, 0.2)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=OUTPUT_TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(lse, expected_lse.float(), rtol=0, atol=LSE_TOLERANCE[torch.bfloat16])


def test_flash_attn_3_missing_at_the_call() -> None:
    if FlashAttn3Kernel.is_installed():
        pytest.skip("FlashAttention 3 is installed")
    with pytest.raises(RuntimeError, match="fa3-fwd"):
        FlashAttn3Kernel()(*SHAPES[0].draw(torch.bfloat16), True, 0.2)


def test_both_orders_end_with_a_kernel_that_supports_everything() -> None:
    for order in (kernels.PREFILL_ORDER, kernels.DECODE_ORDER):
        assert set(order) <= set(KERNELS.values()) and order[-1] is ReferenceKernel
