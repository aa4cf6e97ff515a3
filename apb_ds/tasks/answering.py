"""Settings of tasks whose answers are free text: their length, and how tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apb_ds.config import check_bool, check_integer
from apb_ds.tasks.base import ConversationConfig
from apb_ds.tasks.checks import as_tuple, is_number
from apb_ds.tasks.text import check_quoted, clean

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class AnsweringConfig(ConversationConfig):
    """How answers are generated.

    Parameters
    ----------
    max_new_tokens : int, tokens
        Length of an answer at most.
    do_sample : bool
        Whether tokens are sampled; false takes the likeliest. Default: true if any of the four keys below is given.
    temperature, top_p, top_k, min_p : float, float, int, float
        As in transformers, where ``top_k=0`` is off. The defaults are the model's own generation settings.
    repetition_penalty : float
        Above 1, tokens that occurred before become less likely.
    stop : str or list of str
        Texts that end the answer; the model's end-of-sequence tokens always do.
    allow_special_tokens : bool
        Whether control tokens written in documents and queries, such as ``<|im_end|>``, take effect. Default: they are
        text, and only the chat template's own take effect.
    system, template : see `ConversationConfig`
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    allow_special_tokens: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("task.max_new_tokens", self.max_new_tokens, 1)
        self._check_sampling()
        _check_above_zero("task.repetition_penalty", self.repetition_penalty, "1 has no effect")
        self._check_stop()
        check_bool("task.allow_special_tokens", self.allow_special_tokens)

    def _check_sampling(self) -> None:
        _check_above_zero("task.temperature", self.temperature, "leave it out to take the likeliest tokens")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"task.{name}={value!r} must be a number in [0, 1].")
        if self.top_k is not None:
            check_integer("task.top_k", self.top_k, 0)
        if self.do_sample is None:
            return
        check_bool("task.do_sample", self.do_sample)
        given = [name for name in SAMPLING_KEYS if getattr(self, name) is not None]
        if given and not self.do_sample:
            raise ValueError(
                f"task.do_sample=false takes the likeliest tokens, but task.{given[0]}={getattr(self, given[0])} asks "
                "for sampling; give one of the two."
            )

    def _check_stop(self) -> None:
        if self.stop is None:
            return
        stops = list(as_tuple(self.stop))
        for place, text in enumerate(stops):
            check_quoted("task.stop", text)
            stops[place], problem = clean(text, may_be_blank=True) if isinstance(text, str) else ("", None)
            if problem:
                raise ValueError(f"task.stop={text!r} {problem}.")
        if not stops or not all(stops):
            raise ValueError(f"task.stop={self.stop!r} must be a text or a list of texts, none of them empty.")
        object.__setattr__(self, "stop", stops)

    def generate_arguments(self) -> dict[str, Any]:
        """Return the arguments of `engine.generate` other than the length."""
        values = {name: getattr(self, name) for name in SAMPLING_KEYS}
        samples = any(value is not None for value in values.values()) if self.do_sample is None else self.do_sample
        arguments = {"do_sample": samples, **values, "repetition_penalty": self.repetition_penalty}
        if self.stop is not None:
            arguments["stop_strings"] = list(self.stop)
        return {name: value for name, value in arguments.items() if value is not None}


def _check_above_zero(field: str, value: float | None, hint: str) -> None:
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(f"{field}={value!r} must be a number above 0; {hint}.")
