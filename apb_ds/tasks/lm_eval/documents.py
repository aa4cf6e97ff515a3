"""The harness's documents: built, turned into requests, and scored, all by its own code.

Imported only if lm-evaluation-harness is installed.
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
from apb_ds.tasks.lm_eval.load import check_servable, load_tasks, task_manager
from apb_ds.tasks.lm_eval.prompts import NO_ROLLING, HarnessPrompts, HarnessRequest, Pair
from apb_ds.tasks.ruler.harness import quiet
from apb_ds.tasks.template import TemplateRefusal, has_template
from apb_ds.utils.text import kind_and_line

BOOTSTRAP_RESAMPLES = 1000
# The harness's results that are kept; the others repeat the settings.
RESULT_KEYS = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass
class HarnessSample:
    """One document of one task, with everything that is asked about it.

    Attributes
    ----------
    instances : as the harness made them
    requests : their prompts; answers are in the order of the instances, one for each repeat
    reference : what the task compares with
    problem : why nothing can be asked, or None
    """

    task: str
    doc_id: int
    instances: list[Instance]
    requests: tuple[HarnessRequest, ...] = ()
    reference: Any = None
    problem: str | None = None

    @property
    def key(self) -> str:
        return f"{self.task}/{self.doc_id}"


class _Built(Exception):
    """Raised when the harness has built its instances and asks the model."""


class _PromptRecorder(HarnessPrompts):
    """A model that answers nothing: it stops the harness once the prompts are built."""

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise _Built

    loglikelihood = loglikelihood_rolling = generate_until

    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> Any:
        return self.scorings(requests)

    def requests_of(self, instances: Sequence[Instance]) -> list[HarnessRequest]:
        """Return the instances' requests, in order; ValueError for an empty prompt or an unsupported kind."""
        requests: list[HarnessRequest] = []
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
    tasks, groups : the harness's own, by name
    samples : all documents asked for
    """

    tasks: dict[str, Task]
    groups: dict[str, Any]
    samples: list[HarnessSample] = field(default_factory=list)

    def score(self, sample: HarnessSample, answers: Sequence[Any]) -> tuple[float | None, dict[str, Any]]:
        """Return the main score, and all numbers that the task's metrics give for this document.

        The main score is the first of them from 0 to 1, None if there is none.
        """
        found = {f"{metric},{key}": value for (metric, key), value in self._metrics(sample, answers).items()}
        numbers = {name: float(value) for name, value in found.items() if _is_number(value)}
        return next((value for value in numbers.values() if 0 <= value <= 1), None), numbers

    def results(self, answered: Iterable[tuple[HarnessSample, Sequence[Any]]]) -> dict[str, Any]:
        """Return what the harness reports of all answers: the metrics of tasks and groups, aggregated in its way."""
        collected: dict[str, Any] = {}
        for sample, answers in answered:
            new = {"task": self.tasks[sample.task], "raw_metrics": defaultdict(list), "logged_samples": []}
            raw = collected.setdefault(sample.task, new)["raw_metrics"]
            for metric, value in self._metrics(sample, answers).items():
                raw[metric].append(value)
        # In one process, like the model. Documents that were left out do not count in a group's mean.
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
            else:  # repeats are equal
                instance.resps = [tuple(next(left))] * repeats
            instance.filtered_resps = {}
        found: dict[tuple[str, str], Any] = {}
        try:
            with quiet(), mock.patch.object(task, "_instances", sample.instances):
                task.apply_filters()
                for key in sample.instances[0].filtered_resps:
                    responses = [instance.filtered_resps[key] for instance in sample.instances]
                    metrics = task.process_results(sample.instances[0].doc, responses)
                    found |= {(metric, key): value for metric, value in metrics.items()}
        except Exception as error:  # any kind, from the task's own code
            why = kind_and_line(error)
            raise ValueError(f"task.tasks: {sample.task} cannot score document {sample.doc_id} ({why}).") from error
        return found


def build(config: LmEvalConfig, tokenizer: Any, seed: int) -> HarnessTasks:
    """Have the harness load the tasks and build their prompts.

    Parameters
    ----------
    tokenizer : the model's own, with the template's arguments; also replaces any that the harness would load
    seed : 0 draws the harness's own few-shot examples

    Raises
    ------
    ValueError
        If a data set is not available, or the engine cannot serve a task, naming the task.
    """
    recorder = _PromptRecorder(tokenizer, config.split, config.query_start)
    manager = task_manager(config.tasks, config.include_path)
    specs, loaded = load_tasks(manager, config.tasks, config.metadata, tokenizer)
    apply_template = has_template(tokenizer) if config.apply_chat_template is None else config.apply_chat_template
    arguments = {} if config.max_new_tokens is None else {"gen_kwargs": {"max_gen_toks": config.max_new_tokens}}
    for name, task in loaded["tasks"].items():
        check_servable(name, task)
    try:
        with quiet(), contextlib.suppress(_Built):
            simple_evaluate(
                model=recorder,
                tasks=specs,
                task_manager=manager,  # a new one would read all YAML files again
                limit=config.num_samples,
                num_fewshot=config.num_fewshot,
                system_instruction=config.read_system(),
                apply_chat_template=apply_template,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                random_seed=DEFAULT_RANDOM_SEED + seed,
                numpy_random_seed=DEFAULT_OTHER_SEED + seed,
                torch_random_seed=DEFAULT_OTHER_SEED + seed,
                fewshot_random_seed=DEFAULT_OTHER_SEED + seed,
                **arguments,
            )
    except TemplateRefusal:
        raise
    except Exception as error:  # any kind, from the task's own code
        why = kind_and_line(error)
        raise ValueError(f"task.tasks={list(config.tasks)}: the prompts cannot be made ({why}).") from error
    samples = [sample for name, task in loaded["tasks"].items() for sample in _samples(name, task, recorder)]
    return HarnessTasks(loaded["tasks"], loaded["groups"], samples)


def _samples(name: str, task: Task, recorder: _PromptRecorder) -> Iterator[HarnessSample]:
    by_document: dict[int, list[Instance]] = {}
    for instance in task.instances:
        by_document.setdefault(int(instance.doc_id or 0), []).append(instance)
    for doc_id, instances in by_document.items():
        instances.sort(key=lambda instance: instance.idx)
        sample = HarnessSample(name, doc_id, instances, reference=_plain(task.doc_to_target(instances[0].doc)))
        try:
            sample.requests = tuple(recorder.requests_of(instances))
        except ValueError as error:  # concerns this document only
            sample.problem = str(error)
        yield sample


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (str, tuple, list)) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
