"""The harness's tasks by name, with their data; a task that cannot be loaded or served is refused in one line.

Imported only if lm-evaluation-harness is installed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from apb_ds.config import suggest
from apb_ds.tasks.lm_eval.prompts import NO_ROLLING
from apb_ds.tasks.ruler.cache import hash_tokenizer
from apb_ds.tasks.ruler.harness import quiet
from apb_ds.tasks.text import expand_path
from apb_ds.utils.text import kind_and_line


def check_names(names: Sequence[str], include_path: Sequence[str]) -> None:
    """Raise ValueError if the harness does not know one of the tasks, naming the nearest."""
    known = task_manager(names, include_path).all_tasks
    for name in names:
        if name not in known and not os.path.isfile(os.path.expanduser(name)):
            more = "" if include_path else " The harness finds your own tasks with task.include_path."
            raise ValueError(
                f"task.tasks={name!r} is neither a YAML file nor one of this lm-evaluation-harness's {len(known)} "
                f"tasks and groups.{suggest(name, known)}{more}"
            )


@functools.lru_cache(maxsize=4)
def _index(folders: tuple[str, ...], include_defaults: bool) -> TaskManager:
    with quiet():
        return TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)


def task_manager(names: Sequence[str], include_path: Sequence[str]) -> TaskManager:
    """Return the harness's index of tasks; its own 14000 take a while to read and are left out if possible."""
    folders = tuple(str(expand_path("task.include_path", value)) for value in include_path)
    if folders:
        own = _index(folders, False)
        if all(name in own.all_subtasks for name in names):
            return own
    return _index(folders, True)


def load_tasks(
    manager: TaskManager, names: Sequence[str], metadata: dict[str, Any], tokenizer: Any
) -> tuple[list[Any], Any]:
    """Return the tasks and groups with their data: those named, and dicts of all of them by name."""
    from transformers import AutoTokenizer

    # Some tasks size their texts with a tokenizer that they load by this name, and keep it. (A new manager for each job
    # would read all YAML files again.)
    name_of_tokenizer = f"tokenizer-{hash_tokenizer(tokenizer)[:16]}"
    manager._factory._meta = {"pretrained": name_of_tokenizer, **metadata}
    specs: list[Any] = []
    ours = staticmethod(lambda *_, **__: tokenizer)
    for name in names:
        try:
            with quiet(), mock.patch.object(AutoTokenizer, "from_pretrained", ours):
                spec = manager._load_spec(os.path.expanduser(name) if name not in manager.all_tasks else name)
        except Exception as error:  # any kind, from the data set's or the task's own code
            raise ValueError(_why_not_loaded(name, error)) from error
        specs += spec if isinstance(spec, list) else [spec]
    try:
        return specs, manager.load(specs)
    except ValueError as error:  # a task in two groups
        raise ValueError(f"task.tasks={list(names)}: {error}.") from error


def _why_not_loaded(name: str, error: Exception) -> str:
    if isinstance(error, (ConnectionError, FileNotFoundError)):
        return (
            f"task.tasks: cannot get the data of {name} ({kind_and_line(error)}). Run it once with network access and "
            "copy the folder that HF_HOME names, or write a YAML file that reads a local one (task.include_path, "
            "dataset_path: json, dataset_kwargs: {data_files: ...})."
        )
    return f"task.tasks: {name} cannot be loaded ({kind_and_line(error)})."


def check_servable(name: str, task: Task) -> None:
    """Raise ValueError for a task that this engine cannot or should not run."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ValueError(f"task.tasks: {name} asks for loglikelihood_rolling, which is not supported: {NO_ROLLING}")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"task.tasks: {name} contains images or audio, and this engine reads text only. Leave it out.")
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(
            f"task.tasks: {name} runs code that the model has written. Run it in your own sandbox: "
            "lm_eval.simple_evaluate(model=apb_ds.HarnessModel(engine, tokenizer), confirm_run_unsafe_code=True, ...)."
        )
