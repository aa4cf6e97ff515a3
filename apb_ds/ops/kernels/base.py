"""The interface of an attention kernel: output and log-sum-exp of square causal or unmasked attention."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import torch
from torch import Tensor


class Kernel:
    """Attention with grouped KV heads that returns its log-sum-exp. Each subclass wraps one backend.

    Only the two cases that every stock kernel supports: unmasked, and causal with as many queries as keys. Queries and
    keys are never empty: some backends crash on that.
    """

    name: ClassVar[str]
    device_type: ClassVar[str | None] = None  # None: any
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None  # None: any
    max_head_dim: ClassVar[int | None] = None
    min_capability: ClassVar[int] = 0  # CUDA compute capability, major
    package: ClassVar[str | None] = None  # module that must be installed
    extra: ClassVar[str | None] = None  # what to install to get it
    can_be_recorded: ClassVar[bool] = False  # whether `attend_first` may be part of a CUDA graph

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Compute attention.

        Parameters
        ----------
        query : (1, heads, queries, head_dim), queries >= 1
        key, value : (1, kv_heads, keys, head_dim), keys >= 1; heads is a multiple of kv_heads
        causal : query i sees keys 0..i; needs queries == keys
        scale : factor on the logits

        Returns
        -------
        output : (1, heads, queries, head_dim) in ``query.dtype``
        lse : (1, heads, queries), float32, natural log
        """
        raise NotImplementedError

    def attend_first(
        self, query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend without a mask to the first keys of buffers.

        Parameters
        ----------
        query : (1, heads, 1, head_dim)
        key, value : (1, kv_heads, capacity, head_dim); values past the first `num_keys` must be finite
        num_keys : (1,), int32, on the device: how many keys to attend to, at least 1

        Returns
        -------
        As `__call__`.
        """
        stop = int(num_keys)  # waits for the device; kernels that can be recorded override this
        return self(query, key[:, :, :stop], value[:, :, :stop], False, scale)

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the backend's package can be found; it is not imported."""
        return cls.package is None or importlib.util.find_spec(cls.package) is not None

    @classmethod
    def why_not(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Return why this kernel cannot serve such tensors here, or None if it can."""
        if cls.device_type is not None and device.type != cls.device_type:
            return f"it runs on {cls.device_type}, not on {device.type}"
        if cls.dtypes is not None and dtype not in cls.dtypes:
            return f"it takes {', '.join(map(str, cls.dtypes))}, not {dtype}"
        if cls.max_head_dim is not None and (head_dim > cls.max_head_dim or head_dim % 8):
            return f"it takes head dimensions up to {cls.max_head_dim} in steps of 8, not {head_dim}"
        if cls.min_capability and torch.cuda.get_device_capability(device)[0] < cls.min_capability:
            return f"it needs compute capability {cls.min_capability}.0 or newer"
        return None


def expand_kv_heads(states: Tensor, heads: int) -> Tensor:
    """Repeat (1, kv_heads, tokens, head_dim) to (1, heads, tokens, head_dim), each KV head for its group of heads."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)
