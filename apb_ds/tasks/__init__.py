"""What is asked of a model: a task yields samples of document, query and ground truth. By name, from a registry."""

from __future__ import annotations

from apb_ds.tasks.base import Sample, TaskConfig, build_task_config, register_task, task_names
from apb_ds.tasks.passkey import PasskeyConfig

__all__ = ["PasskeyConfig", "Sample", "TaskConfig", "build_task_config", "register_task", "task_names"]
