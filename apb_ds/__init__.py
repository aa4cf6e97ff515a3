"""APB: sequence-parallel approximate attention for long prompts, inside DeepSpeed inference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apb_ds.config import APBConfig
from apb_ds.plan import Plan, plan_request

if TYPE_CHECKING:
    from apb_ds.attention import APBAttention, Phase
    from apb_ds.cache import ShardedCache
    from apb_ds.engine.api import attach, detach, init_inference, load_model
    from apb_ds.engine.batch import Batch
    from apb_ds.engine.context import Branch, Context
    from apb_ds.engine.engine import APBEngine
    from apb_ds.engine.sequences import Cancelled, Handle
    from apb_ds.engine.split import Split
    from apb_ds.tasks.lm_eval.model import HarnessModel
    from apb_ds.tasks.prompts import EncodedChat, encode_chat, encode_turn

__version__ = "0.1.0"

__all__ = [
    "APBAttention",
    "APBConfig",
    "APBEngine",
    "Batch",
    "Branch",
    "Cancelled",
    "Context",
    "EncodedChat",
    "Handle",
    "HarnessModel",
    "Phase",
    "Plan",
    "ShardedCache",
    "Split",
    "attach",
    "detach",
    "encode_chat",
    "encode_turn",
    "init_inference",
    "load_model",
    "plan_request",
]

# Where each name is defined; loaded on first use, since importing torch, transformers and deepspeed takes seconds.
_LAZY = {
    "APBAttention": "apb_ds.attention",
    "Phase": "apb_ds.attention",
    "ShardedCache": "apb_ds.cache",
    "attach": "apb_ds.engine.api",
    "detach": "apb_ds.engine.api",
    "init_inference": "apb_ds.engine.api",
    "load_model": "apb_ds.engine.api",
    "Batch": "apb_ds.engine.batch",
    "Branch": "apb_ds.engine.context",
    "Context": "apb_ds.engine.context",
    "APBEngine": "apb_ds.engine.engine",
    "Cancelled": "apb_ds.engine.sequences",
    "Handle": "apb_ds.engine.sequences",
    "Split": "apb_ds.engine.split",
    "HarnessModel": "apb_ds.tasks.lm_eval.model",
    "EncodedChat": "apb_ds.tasks.prompts",
    "encode_chat": "apb_ds.tasks.prompts",
    "encode_turn": "apb_ds.tasks.prompts",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'apb_ds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
