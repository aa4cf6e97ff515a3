"""APB: sequence-parallel approximate attention for long prompts, inside DeepSpeed inference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apb_ds.config import APBConfig
from apb_ds.plan import Plan, plan_request

if TYPE_CHECKING:
    from apb_ds.attention import APBAttention, Phase
    from apb_ds.cache import ShardedCache
    from apb_ds.context import Context
    from apb_ds.engine import APBEngine
    from apb_ds.entry import attach, detach, init_inference
    from apb_ds.harness_model import HarnessModel

__version__ = "0.1.0"

# Where each name lives; loaded on first use, since importing torch, transformers and deepspeed takes seconds.
_LAZY = {
    "APBAttention": "apb_ds.attention",
    "Phase": "apb_ds.attention",
    "ShardedCache": "apb_ds.cache",
    "APBEngine": "apb_ds.engine",
    "Context": "apb_ds.context",
    "HarnessModel": "apb_ds.harness_model",
    "attach": "apb_ds.entry",
    "detach": "apb_ds.entry",
    "init_inference": "apb_ds.entry",
}

__all__ = ["APBConfig", "Plan", "plan_request", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'apb_ds' has no attribute {name!r}")
