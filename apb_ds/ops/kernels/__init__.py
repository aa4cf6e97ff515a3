"""Attention kernels by name, and the choice among them by device, dtype and what is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    FlashAttn3Kernel,
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
        self.name = kernel.name  # type: ignore[misc]
        self.has_window = kernel.has_window  # type: ignore[misc]
        self.has_softcap = kernel.has_softcap  # type: ignore[misc]

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with profiling.part(profiling.ATTENTION):
            return self.kernel(*arguments, **options)

    def attend_all(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with profiling.part(profiling.ATTENTION):
            return self.kernel.attend_all(*arguments, **options)

    def attend_first(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with profiling.part(profiling.ATTENTION):
            return self.kernel.attend_first(*arguments, **options)

    def attend_slots(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with profiling.part(profiling.ATTENTION):
            return self.kernel.attend_slots(*arguments, **options)

    def attend_last(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with profiling.part(profiling.ATTENTION):
            return self.kernel.attend_last(*arguments, **options)


def check_kernel_name(name: str) -> None:
    """Raise ValueError for an unknown kernel, RuntimeError if its package is not installed."""
    check_choice("kernel", name, ["auto", *KERNELS])
    if name != "auto" and not KERNELS[name].is_installed():
        kernel = KERNELS[name]
        raise RuntimeError(f"kernel={name!r} needs a package that is not installed ({kernel.package}): {kernel.extra}.")


@dataclass(frozen=True)
class _Case:
    """What kernels are chosen for."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    window: bool
    softcap: bool

    def why_not(self, kernel: type[Kernel]) -> str | None:
        return kernel.why_not(self.device, self.dtype, self.head_dim, window=self.window, softcap=self.softcap)

    def fitting(self, order: tuple[type[Kernel], ...]) -> list[Kernel]:
        return [kernel() for kernel in order if kernel.is_installed() and self.why_not(kernel) is None]


def choose_kernels(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, *, window: bool = False, softcap: bool = False
) -> KernelChoice:
    """Choose kernels for tensors of `dtype` on `device`.

    Parameters
    ----------
    name : str
        A kernel's name, or ``auto`` for the first one that is installed and supports what is asked for.
    window, softcap : bool
        Whether calls will have a window, a cap on the logits.

    Raises
    ------
    ValueError
        If the name is unknown or the kernel does not support what is asked for.
    RuntimeError
        If the kernel's package is not installed.
    """
    check_kernel_name(name)
    case = _Case(device, dtype, head_dim, window, softcap)
    fitting = case.fitting(PREFILL_ORDER)
    if name == "auto":
        return KernelChoice(fitting[0], case.fitting(DECODE_ORDER)[0], _recordable(fitting))
    reason = case.why_not(KERNELS[name])
    if reason is not None:
        others = ", ".join(kernel.name for kernel in fitting)
        raise ValueError(f"kernel={name!r} does not fit: {reason}. Use kernel=auto, or one of: {others}.")
    kernel = KERNELS[name]()
    return KernelChoice(kernel, kernel, _recordable([kernel]))


def _recordable(kernels: list[Kernel]) -> Kernel | None:
    return next((kernel for kernel in kernels if kernel.can_be_recorded), None)
