"""lm-evaluation-harness's own code for RULER: its settings, modules and metrics, prevented from downloading."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

RULER = "lm_eval.tasks.ruler"


@dataclass(frozen=True)
class HarnessTask:
    """A task's settings in the harness.

    Attributes
    ----------
    module, function : where its samples are made
    metric : the function that scores an answer
    max_new_tokens : tokens of an answer at most
    delimiter : what separates prompt and answer prefix without a chat template
    """

    name: str
    module: str
    function: str
    metric: str
    max_new_tokens: int
    delimiter: str


def check_installed() -> None:
    """Raise RuntimeError unless the harness and what its RULER tasks import are installed."""
    for package in ("lm_eval", "wonderwords", "nltk", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(
                f"task=ruler needs lm-evaluation-harness and its dependencies: the package {package} is missing; "
                "install it with: pip install -e '.[eval]'"
            )


def harness_version() -> str:
    """Return the version of the installed harness."""
    from importlib.metadata import version

    return version("lm_eval")


@functools.cache
def read_task(name: str) -> HarnessTask:
    """Return a task's settings from the harness's own configuration."""
    check_installed()
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(str(importlib.import_module(RULER).__path__[0]))
    values = load_yaml(folder / f"{name.removeprefix('ruler_')}.yaml", resolve_func=False)
    module, function = Path(values["custom_dataset"]).name.split(".")
    return HarnessTask(
        name=name,
        module=module,
        function=function,
        metric=Path(values["process_results"]).name.split(".")[1],
        max_new_tokens=values["generation_kwargs"]["max_gen_toks"],
        delimiter=values["target_delimiter"],
    )


def score(task: HarnessTask, references: tuple[str, ...], prediction: str) -> float:
    """Return the harness's score of an answer, in [0, 1]."""
    metric = getattr(load_module("common_utils"), task.metric)
    length = 0  # the metric files its score under the prompt's length
    return float(metric({"max_length": length, "outputs": list(references)}, [prediction])[str(length)])


def load_module(name: str) -> ModuleType:
    """Import one of the harness's modules; one of them would download a sentence splitter at import, which is off."""
    check_installed()
    import nltk

    with mock.patch.object(nltk, "download", lambda *_, **__: False), quiet():
        return importlib.import_module(f"{RULER}.{name}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the harness's output and warnings."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        harness.setLevel(level)
