"""The harness' documents: built, turned into requests, and scored, all by its own code.

Imported only where lm-evaluation-harness is installed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import simple_evaluate
from lm_eval.evaluator_utils import _process_results

from apb_ds.tasks.lm_eval.config import LmEvalConfig
from apb_ds.tasks.lm_eval.load import check_servable, first_line, load_tasks, task_manager
from apb_ds.tasks.lm_eval.prompts import NO_ROLLING, HarnessPrompts, Pair, Request
from apb_ds.tasks.ruler.harness import quiet, replaced

BOOTSTRAP_RESAMPLES = 1000
# What of the harness' results says more than the settings do.
RESULT_KEYS = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass
class HarnessSample:
    """One document of one task, with all that is asked about it.

    Attributes
    ----------
    instances : as the harness has made them
    requests : their prompts; the answers follow in the order of the instances, as many for each as it is repeated
    reference : what the task compares with
    problem : why nothing can be asked, if so
    """

    task: str
    doc_id: int
    instances: list[Instance]
    requests: tuple[Request, ...] = ()
    reference: Any = None
    problem: str | None = None

    @property
    def key(self) -> str:
        return f"{self.task}/{self.doc_id}"


class _Built(Exception):
    """The harness has built its instances and is about to ask."""


class _Asked(HarnessPrompts):
    """A model that answers nothing: it only has the harness build its prompts."""

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise _Built

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise _Built

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise _Built

    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> Any:
        return self.scorings(requests)

    def requests_of(self, instances: Sequence[Instance]) -> list[Request]:
        """Return what the instances ask, in their order.

        Raises
        ------
        ValueError
            For an empty prompt, or what the engine has no answer to.
        """
        requests: list[Request] = []
        for kind, group in itertools.groupby(instances, key=lambda instance: instance.request_type):
            if kind == "generate_until":
                for instance in group:
                    prompt, arguments = instance.args[:2]
                    requests.append(self.generation(prompt, arguments, instance.repeats or 1))
            elif kind == "loglikelihood":
                requests += super().loglikelihood(list(group), disable_tqdm=True)
            else:
                raise ValueError(f"{kind} is not supported: {NO_ROLLING}")
        return requests


@dataclass
class HarnessTasks:
    """Tasks with their documents.

    Attributes
    ----------
    tasks, groups : the harness' own, by name
    samples : every document that was asked for
    """

    tasks: dict[str, Task]
    groups: dict[str, Any]
    samples: list[HarnessSample] = field(default_factory=list)

    def score(self, sample: HarnessSample, answers: Sequence[Any]) -> tuple[float | None, dict[str, Any]]:
        """Return the main score, and every number that the task's metrics give for this document.

        The main score is the first metric's, after the first filter, if it is a number from 0 to 1; else None.
        """
        found = {f"{metric},{key}": value for (metric, key), value in self._metrics(sample, answers).items()}
        numbers = {name: float(value) for name, value in found.items() if _is_number(value)}
        return next((value for value in numbers.values() if 0 <= value <= 1), None), numbers

    def results(self, answered: Iterable[tuple[HarnessSample, Sequence[Any]]]) -> dict[str, Any]:
        """Return what the harness reports of all answers: each task's and group's metrics, aggregated its own way."""
        collected: dict[str, Any] = {}
        for sample, answers in answered:
            new = {"task": self.tasks[sample.task], "raw_metrics": defaultdict(list), "logged_samples": []}
            raw = collected.setdefault(sample.task, new)["raw_metrics"]
            for place, value in self._metrics(sample, answers).items():
                raw[place].append(value)
        # One process, as it is for the model; and no document that is left out belongs to a group's mean.
        with quiet(), mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
            whole = _process_results(collected, self.groups, BOOTSTRAP_RESAMPLES)._to_eval_results()
        return {key: _plain(whole[key]) for key in RESULT_KEYS if key in whole}

    def _metrics(self, sample: HarnessSample, answers: Sequence[Any]) -> dict[tuple[str, str], Any]:
        """Return the metrics of a document by name and filter."""
        task = self.tasks[sample.task]
        left = iter(answers)
        for instance in sample.instances:
            repeats = instance.repeats or 1
            if instance.request_type == "generate_until":
                instance.resps = list(itertools.islice(left, repeats))
            else:  # the same every time
                instance.resps = [tuple(next(left))] * repeats
            instance.filtered_resps = {}
        found: dict[tuple[str, str], Any] = {}
        try:
            with quiet(), replaced(task, _instances=sample.instances):
                task.apply_filters()
                for key in sample.instances[0].filtered_resps:
                    responses = [instance.filtered_resps[key] for instance in sample.instances]
                    metrics = task.process_results(sample.instances[0].doc, responses)
                    found |= {(metric, key): value for metric, value in metrics.items()}
        except Exception as error:  # a task's own code, of any kind
            raise ValueError(
                f"task.tasks: {sample.task} cannot score document {sample.doc_id} ({first_line(error)})."
            ) from error
        return found


def build(config: LmEvalConfig, tokenizer: Any, seed: int) -> HarnessTasks:
    """Have the harness load the tasks and build their prompts.

    Parameters
    ----------
    tokenizer : the model's own, which the harness is given wherever it would load one itself
    seed : 0 draws the harness' own few-shot examples

    Raises
    ------
    ValueError
        If a data set cannot be had, or a task asks for what cannot be answered, naming the task.
    """
    asked = _Asked(tokenizer, config.split, config.query_start)
    specs = load_tasks(config, tokenizer)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    tasks: dict[str, Task] = {}
    groups: dict[str, Any] = {}
    for spec in specs:
        if isinstance(spec, Task):
            tasks[spec.task_name] = spec
        else:
            groups |= {group.name: group for group in [spec, *spec.get_all_groups()]}
            tasks |= {task.task_name: task for task in spec.get_all_tasks()}
    for name, task in tasks.items():
        check_servable(name, task)
    arguments = {} if config.max_new_tokens is None else {"gen_kwargs": {"max_gen_toks": config.max_new_tokens}}
    try:
        with quiet(), contextlib.suppress(_Built):
            simple_evaluate(
                model=asked,
                tasks=specs,
                task_manager=task_manager(config),  # or it would read all YAML files again
                limit=config.num_samples,
                num_fewshot=config.num_fewshot,
                apply_chat_template=has_template if config.apply_chat_template is None else config.apply_chat_template,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                random_seed=DEFAULT_RANDOM_SEED + seed,
                numpy_random_seed=DEFAULT_OTHER_SEED + seed,
                torch_random_seed=DEFAULT_OTHER_SEED + seed,
                fewshot_random_seed=DEFAULT_OTHER_SEED + seed,
                **arguments,
            )
    except Exception as error:  # a task's own code, of any kind
        raise ValueError(
            f"task.tasks={list(config.tasks)}: the prompts cannot be made ({first_line(error)})."
        ) from error
    samples = [sample for name, task in tasks.items() for sample in _samples(name, task, asked)]
    return HarnessTasks(tasks, groups, samples)


def _samples(name: str, task: Task, asked: _Asked) -> Iterator[HarnessSample]:
    by_document: dict[int, list[Instance]] = {}
    for instance in task.instances:
        by_document.setdefault(int(instance.doc_id or 0), []).append(instance)
    for doc_id, instances in by_document.items():
        instances.sort(key=lambda instance: instance.idx)
        sample = HarnessSample(name, doc_id, instances, reference=_plain(task.doc_to_target(instances[0].doc)))
        try:
            sample.requests = tuple(asked.requests_of(instances))
        except ValueError as error:  # this document's alone
            sample.problem = str(error)
        yield sample


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (str, tuple, list)) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are none become null."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
