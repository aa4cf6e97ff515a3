"""The settings of a task of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from apb_ds.config import check_bool, check_choice
from apb_ds.tasks.base import ConversationConfig, Sample, register_task
from apb_ds.tasks.checks import as_tuple, check_integers, check_optional_text
from apb_ds.tasks.lm_eval.split import SPLITS
from apb_ds.tasks.template import has_template, with_template
from apb_ds.tasks.text import find_folder


@register_task
@dataclass(frozen=True)
class LmEvalConfig(ConversationConfig):
    """Tasks of lm-evaluation-harness, with its names, prompts, metrics and few-shot examples.

    Parameters
    ----------
    tasks : str or list of str
        Names of tasks, groups or tags, or paths of YAML files.
    num_samples : int, optional
        Documents of each task. Default: all.
    num_fewshot : int, optional
        Solved examples before each question. Default: the task's own.
    apply_chat_template : bool, optional
        Default: whether the tokenizer has one.
    fewshot_as_multiturn : bool
        Whether examples are turns of the chat, or all in one turn.
    max_new_tokens : int, tokens, optional
        Length of an answer at most. Default: the task's own.
    split : str
        How a prompt is cut into document and query: ``paragraph``, ``line`` or ``turn``.
    query_start : str, optional
        A text that the query begins with, if the prompt contains it; else `split` decides.
    include_path : str or list of str, optional
        Folders with your own YAML tasks.
    metadata : dict
        For tasks that take arguments, such as ``{max_seq_lengths: [4096]}``.
    system : str, optional
        A system prompt, which the harness puts before the task's own: a text, or ``@FILE``.
    template : see `ConversationConfig`
    """

    name: ClassVar[str] = "lm_eval"
    tasks: str | list[str] | tuple[str, ...] = ()
    num_samples: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool = True
    max_new_tokens: int | None = None
    split: str = "paragraph"
    query_start: str | None = None
    include_path: str | list[str] | tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tasks", "include_path"):
            given = getattr(self, name)
            values = as_tuple(given)
            if not all(isinstance(value, str) and value for value in values) or len({*values}) < len(values):
                raise ValueError(f"task.{name}={given!r} must be a name or a list of names, none of them twice.")
            object.__setattr__(self, name, values)
        if not self.tasks:
            raise ValueError("task.tasks is missing: name tasks of lm-evaluation-harness, as in 'task.tasks=[gsm8k]'.")
        check_integers(self, num_samples=1, num_fewshot=0, max_new_tokens=1)
        if self.apply_chat_template is not None:
            check_bool("task.apply_chat_template", self.apply_chat_template)
        if self.template and self.apply_chat_template is False:
            raise ValueError(
                f"task.template={self.template} needs the chat template, which task.apply_chat_template=false leaves "
                "out; give one of the two."
            )
        check_bool("task.fewshot_as_multiturn", self.fewshot_as_multiturn)
        check_choice("task.split", self.split, SPLITS)
        check_optional_text("task.query_start", self.query_start, "a text, such as 'Question:'")
        if not isinstance(self.metadata, dict):
            raise ValueError(f"task.metadata={self.metadata!r} must be a mapping, such as {{max_seq_lengths: [4096]}}.")

    def check_sources(self) -> None:
        super().check_sources()
        if importlib.util.find_spec("lm_eval") is None:
            raise RuntimeError(
                "task=lm_eval needs lm-evaluation-harness: the package lm_eval is missing; install it with: "
                "pip install -e '.[eval]'"
            )
        for value in self.include_path:
            find_folder("task.include_path", value)
        from apb_ds.tasks.lm_eval.load import check_names

        check_names(self.tasks, self.include_path)

    def chat_tokenizer(self, tokenizer: Any | None) -> Any:
        """Return the tokenizer with the template's arguments; the harness itself adds the system prompt."""
        if self.apply_chat_template is not False and has_template(tokenizer):
            super().chat_tokenizer(tokenizer)  # the template must take the system prompt: the harness would drop it
        return with_template(tokenizer, None, self.template)

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Raise ValueError: the harness asks more than a sample can hold; see `documents.build`."""
        raise ValueError(f"task={self.name} has several samples; launch/eval.py answers and scores them.")
