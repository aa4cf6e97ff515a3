"""The harness' tasks by name, with their data; what cannot be had or served is told in one line.

Imported only where lm-evaluation-harness is installed.
"""

from __future__ import annotations

import functools
import os
from typing import Any
from unittest import mock

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from apb_ds.config import suggest
from apb_ds.tasks.lm_eval.config import LmEvalConfig
from apb_ds.tasks.lm_eval.prompts import NO_ROLLING
from apb_ds.tasks.ruler.cache import hash_tokenizer
from apb_ds.tasks.ruler.harness import quiet
from apb_ds.tasks.text import expand_path


def check_names(config: LmEvalConfig) -> None:
    """Raise ValueError if the harness does not know one of the tasks, naming the nearest."""
    known = task_manager(config).all_tasks
    for name in config.tasks:
        if name not in known and not os.path.isfile(os.path.expanduser(name)):
            more = "" if config.include_path else " Tasks of your own are found in task.include_path."
            raise ValueError(
                f"task.tasks={name!r} is none of the {len(known)} tasks and groups of this lm-evaluation-harness, and "
                f"no YAML file.{suggest(name, known)}{more}"
            )


@functools.lru_cache(maxsize=4)
def _index(include_path: tuple[str, ...], include_defaults: bool) -> TaskManager:
    with quiet():
        return TaskManager(include_path=list(include_path) or None, include_defaults=include_defaults)


def task_manager(config: LmEvalConfig) -> TaskManager:
    """Return the harness' index of tasks; that of its own 14000 takes a while, and is left out where it can be."""
    folders = tuple(str(expand_path("task.include_path", value)) for value in config.include_path)
    if folders:
        own = _index(folders, False)
        if all(name in own.all_subtasks for name in config.tasks):
            return own
    return _index(folders, True)


def load_tasks(config: LmEvalConfig, tokenizer: Any) -> list[Any]:
    """Return the tasks and groups, with their data."""
    from transformers import AutoTokenizer

    manager = task_manager(config)
    # Some tasks size their texts with a tokenizer that they load by this name, and keep. (A manager of its own for each
    # job would read all YAML files again.)
    name_of_tokenizer = f"tokenizer-{hash_tokenizer(tokenizer)[:16]}"
    manager._factory._meta = {"pretrained": name_of_tokenizer, **config.metadata}
    loaded: list[Any] = []
    ours = staticmethod(lambda *_, **__: tokenizer)
    for name in config.tasks:
        try:
            with quiet(), mock.patch.object(AutoTokenizer, "from_pretrained", ours):
                spec = manager._load_spec(os.path.expanduser(name) if name not in manager.all_tasks else name)
        except Exception as error:  # the data sets' and a task's own code, of any kind
            raise ValueError(_why_not_loaded(name, error)) from error
        loaded += spec if isinstance(spec, list) else [spec]
    return loaded


def _why_not_loaded(name: str, error: Exception) -> str:
    if isinstance(error, (ConnectionError, FileNotFoundError)):
        return (
            f"task.tasks: the data of {name} cannot be had ({first_line(error)}). Run it once where there is a network "
            "and copy the folder that HF_HOME names, or point a YAML of your own at a local file (task.include_path, "
            "dataset_path: json, dataset_kwargs: {data_files: ...})."
        )
    return f"task.tasks: {name} cannot be loaded ({first_line(error)})."


def check_servable(name: str, task: Task) -> None:
    """Raise ValueError for what is not to be run, or cannot be."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ValueError(f"task.tasks: {name} asks for loglikelihood_rolling, which is not supported: {NO_ROLLING}")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"task.tasks: {name} shows images or sounds; this engine reads text. Leave it out.")
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(
            f"task.tasks: {name} runs code that the model has written. Run it in a sandbox of your own: "
            "lm_eval.simple_evaluate(model=apb_ds.HarnessModel(engine, tokenizer), confirm_run_unsafe_code=True, ...)."
        )


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
