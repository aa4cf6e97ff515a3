"""Attention kernels by name, and the choice among them by device, dtype and what is installed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.config import check_choice
from apb_ds.ops import profiling
from apb_ds.ops.kernels.base import Kernel
from apb_ds.ops.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel
from apb_ds.ops.kernels.reference import ReferenceKernel
from apb_ds.ops.kernels.torch_kernels import CPUFlashKernel, TorchCudnnKernel, TorchEfficientKernel, TorchFlashKernel

# Fastest first: for many queries, and for the few queries of decoding, where kernels that split the keys win.
PREFILL_ORDER: tuple[type[Kernel], ...] = (
    FlashAttn3Kernel,
    TorchCudnnKernel,
    FlashAttn2Kernel,
    TorchFlashKernel,
    TorchEfficientKernel,
    CPUFlashKernel,
    ReferenceKernel,
)
DECODE_ORDER: tuple[type[Kernel], ...] = (
    TorchFlashKernel,
    FlashAttn2Kernel,
    TorchCudnnKernel,
    TorchEfficientKernel,
    CPUFlashKernel,
    ReferenceKernel,
)
KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in PREFILL_ORDER}


@dataclass(frozen=True)
class KernelChoice:
    """The kernels of an engine: `prefill` for blocks and queries, `decode` for one token at a time.

    `recorded` serves one token at a time in a CUDA graph; None if no kernel can be recorded.
    """

    prefill: Kernel
    decode: Kernel
    recorded: Kernel | None = None

    @property
    def names(self) -> dict[str, str]:
        return {"prefill": self.prefill.name, "decode": self.decode.name}

    def in_ranges(self) -> KernelChoice:
        """Return the same kernels; a profiler counts their work as attention."""
        return KernelChoice(_RangedKernel(self.prefill), _RangedKernel(self.decode), self.recorded)


class _RangedKernel(Kernel):
    """A kernel that runs within the profiler's range of attention."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        with profiling.part(profiling.ATTENTION):
            return self.kernel(query, key, value, causal, scale)


def check_kernel_name(name: str) -> None:
    """Raise ValueError for an unknown kernel, RuntimeError if its package is not installed."""
    check_choice("kernel", name, ["auto", *KERNELS])
    if name != "auto" and not KERNELS[name].is_installed():
        kernel = KERNELS[name]
        raise RuntimeError(f"kernel={name!r} needs a package that is not installed ({kernel.package}): {kernel.extra}.")


def choose_kernels(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelChoice:
    """Choose kernels for tensors of `dtype` on `device`.

    Parameters
    ----------
    name : str
        A kernel's name, or ``auto`` for the first one that is installed and supports such tensors.

    Raises
    ------
    ValueError
        If the name is unknown or the kernel does not support such tensors.
    RuntimeError
        If the kernel's package is not installed.
    """
    check_kernel_name(name)
    if name == "auto":
        prefill, decode = (_fitting(order, device, dtype, head_dim)[0] for order in (PREFILL_ORDER, DECODE_ORDER))
        return KernelChoice(prefill, decode, _recordable(_fitting(PREFILL_ORDER, device, dtype, head_dim)))
    reason = KERNELS[name].why_not(device, dtype, head_dim)
    if reason is not None:
        raise ValueError(f"kernel={name!r} does not fit: {reason}. Use kernel=auto or another kernel.")
    kernel = KERNELS[name]()
    return KernelChoice(kernel, kernel, _recordable([kernel]))


def _fitting(order: tuple[type[Kernel], ...], device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    return [kernel() for kernel in order if kernel.is_installed() and kernel.why_not(device, dtype, head_dim) is None]


def _recordable(kernels: list[Kernel]) -> Kernel | None:
    return next((kernel for kernel in kernels if kernel.can_be_recorded), None)
