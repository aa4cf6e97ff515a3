"""The flash-attn packages. They use (batch, tokens, heads, head_dim), so tensors are transposed here."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apb_ds.ops.kernels.base import Kernel, without_keys
from apb_ds.ops.kernels.pieces import Logits

FLASH_ATTN_3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
# The namespace in which each registers the operator behind its functions, and the arguments passed to it by name.
FLASH_ATTN_3_OPERATORS = {"flash_attn_interface": "flash_attn_3", "fa3_fwd_interface": "fa3_fwd"}
OPERATOR_ARGUMENTS = {
    "q", "k", "v", "softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap", "num_splits",
}  # fmt: skip
# The module in which each says how it was built.
FLASH_ATTN_3_BUILDS = {"flash_attn_interface": "flash_attn_config", "fa3_fwd_interface": "fa3_fwd_config"}


class _Built:
    """A class attribute: whether the installed FlashAttention 3 was built with something that builds may leave out."""

    def __init__(self, disabling_flag: str) -> None:
        self.disabling_flag = disabling_flag

    def __get__(self, instance: Any, owner: type) -> bool:
        return not _flash_attn_3_build().get(self.disabling_flag, False)


class FlashAttn2Kernel(Kernel):
    """``flash_attn.flash_attn_func`` of the flash-attn 2 package."""

    name = "flash_attn2"
    device_type = "cuda"
    dtypes = (torch.bfloat16, torch.float16)
    max_head_dim = 256
    min_capability = 8
    package = "flash_attn"
    extra = "pip install 'apb_ds[flash]'"
    has_window = True
    has_softcap = True

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        function = importlib.import_module("flash_attn").flash_attn_func
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        options = _options(logits.window, logits.softcap)
        # The third value is the attention matrix, which is only filled in with dropout.
        output, lse, _ = function(
            q, k, v, softmax_scale=logits.scale, causal=logits.causal, return_attn_probs=True, **options
        )
        return output.transpose(1, 2), lse[..., : query.shape[2]].float()

    def attend_slots(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        have_keys: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self._check(window, softcap)
        function = importlib.import_module("flash_attn").flash_attn_with_kvcache
        options = _options(window, softcap) | {"cache_batch_idx": slots.int()}
        output, lse = _with_cache(function, query, key, value, num_keys, scale, options)
        return (output, lse) if have_keys else without_keys(output, lse, (num_keys == 0).view(-1, 1, 1))


class FlashAttn3Kernel(Kernel):
    """FlashAttention 3 for Hopper: ``flash_attn_interface``, or ``fa3_fwd_interface`` of the wheel ``fa3-fwd``."""

    name = "flash_attn3"
    device_type = "cuda"
    dtypes = (torch.bfloat16,)
    max_head_dim = 256
    package = FLASH_ATTN_3_MODULES[0]
    extra = "pip install fa3-fwd"
    can_be_recorded = True
    has_window = _Built("FLASHATTENTION_DISABLE_LOCAL")  # fa3-fwd 0.0.3 is built without
    has_softcap = _Built("FLASHATTENTION_DISABLE_SOFTCAP")

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        options = _options(logits.window, logits.softcap)
        if (operator := _flash_attn_3_operator()) is not None:
            q, k, v = (states if states.stride(-1) == 1 else states.contiguous() for states in (q, k, v))
            if "window_size" in options:
                options["window_size_left"], options["window_size_right"] = options.pop("window_size")
            output, lse, *_ = operator(
                q, k, v, softmax_scale=logits.scale, is_causal=logits.causal, num_splits=1, **options
            )
        else:
            function, asking = _flash_attn_3()
            output, lse, *_ = function(q, k, v, softmax_scale=logits.scale, causal=logits.causal, **asking, **options)
        return output.transpose(1, 2), lse.float()

    def attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(None, softcap)  # it folds heads itself, without copying queries and outputs
        return _with_cache(_flash_attn_3_with_cache(), query, key, value, None, scale, _options(None, softcap))

    def attend_first(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check(window, softcap)
        function = _flash_attn_3_with_cache()
        return _with_cache(function, query, key, value, num_keys, scale, _options(window, softcap))

    def attend_slots(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        have_keys: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self._check(window, softcap)
        options = _options(window, softcap) | {"cache_batch_idx": slots.int()}
        output, lse = _with_cache(_flash_attn_3_with_cache(), query, key, value, num_keys, scale, options)
        return (output, lse) if have_keys else without_keys(output, lse, (num_keys == 0).view(-1, 1, 1))

    @classmethod
    def lacks(cls, window: bool, softcap: bool) -> str | None:
        reason = super().lacks(window, softcap)
        return reason and f"{reason}, as {_flash_attn_3_module()} was built"

    @classmethod
    def is_installed(cls) -> bool:
        return _flash_attn_3_module() is not None

    @classmethod
    def why_not(
        cls, device: torch.device, dtype: torch.dtype, head_dim: int, *, window: bool = False, softcap: bool = False
    ) -> str | None:
        reason = super().why_not(device, dtype, head_dim, window=window, softcap=softcap)
        if reason is None and torch.cuda.get_device_capability(device)[0] != 9:
            return "it is built for Hopper (compute capability 9.0)"
        return reason


def _options(window: int | None, softcap: float | None) -> dict[str, Any]:
    """Return the arguments that the packages' functions share; versions without them still serve other calls."""
    options: dict[str, Any] = {}
    if window is not None:
        options["window_size"] = (window - 1, 0)  # keys before and after the query's place
    if softcap is not None:
        options["softcap"] = softcap
    return options


def _with_cache(
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_keys: Tensor | None,
    scale: float,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Call a package's ``flash_attn_with_kvcache``, which splits the keys, for the first keys of buffers or all."""
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    output, lse, *_ = function(q, k, v, cache_seqlens=num_keys, softmax_scale=scale, return_softmax_lse=True, **options)
    return output.transpose(1, 2), lse.float()


def _flash_attn_3_module() -> str | None:
    return next((name for name in FLASH_ATTN_3_MODULES if importlib.util.find_spec(name)), None)


@cache
def _flash_attn_3_with_cache() -> Any:
    name = _flash_attn_3_module()
    assert name is not None
    return importlib.import_module(name).flash_attn_with_kvcache


@cache
def _flash_attn_3() -> tuple[Any, dict[str, bool]]:
    name = _flash_attn_3_module()
    if name is None:
        raise RuntimeError(f"flash_attn3 is not installed; {FlashAttn3Kernel.extra}.")
    function = importlib.import_module(name).flash_attn_func
    # Older builds always return the log-sum-exp, newer ones on request.
    asks = "return_attn_probs" in inspect.signature(function).parameters
    return function, {"return_attn_probs": True} if asks else {}


@cache
def _flash_attn_3_build() -> dict[str, bool]:
    """Return the flags that the package was built with; none if it does not say, or is not installed."""
    config = FLASH_ATTN_3_BUILDS.get(_flash_attn_3_module() or "")
    if config is None or importlib.util.find_spec(config) is None:
        return {}
    flags: dict[str, bool] = importlib.import_module(config).CONFIG["build_flags"]
    return flags


@cache
def _flash_attn_3_operator() -> Any:
    """Return the operator that the package's function calls, or None if its arguments are not the expected ones.

    The function prepares a backward pass and goes through the dispatcher twice, which takes longer than attention over
    a short block.
    """
    name = _flash_attn_3_module()
    if name is None:
        return None
    importlib.import_module(name)  # registers it
    try:
        operator = getattr(torch.ops, FLASH_ATTN_3_OPERATORS[name]).fwd.default
    except AttributeError:
        return None
    known = {argument.name for argument in operator._schema.arguments}
    required = {argument.name for argument in operator._schema.arguments if not argument.has_default_value()}
    return operator if required <= OPERATOR_ARGUMENTS <= known else None
