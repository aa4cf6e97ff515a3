"""Tasks: each yields samples of document, query and ground truth, and scores answers. Registered by name."""

from __future__ import annotations

from apb_ds.tasks.base import Sample, TaskConfig, build_task_config, register_task, task_names
from apb_ds.tasks.batch import BatchConfig
from apb_ds.tasks.chat import ChatConfig
from apb_ds.tasks.fidelity import FidelityConfig
from apb_ds.tasks.infinitebench import InfiniteBenchConfig
from apb_ds.tasks.lm_eval import LmEvalConfig
from apb_ds.tasks.passkey import PasskeyConfig
from apb_ds.tasks.prompt import PromptConfig
from apb_ds.tasks.ruler import RulerConfig
from apb_ds.tasks.synthetic import SyntheticConfig

__all__ = [
    "BatchConfig",
    "ChatConfig",
    "FidelityConfig",
    "InfiniteBenchConfig",
    "LmEvalConfig",
    "PasskeyConfig",
    "PromptConfig",
    "RulerConfig",
    "Sample",
    "SyntheticConfig",
    "TaskConfig",
    "build_task_config",
    "register_task",
    "task_names",
]
