"""Conversations from a JSONL file in ShareGPT's format, such as LongAlpaca.

Each line is a JSON object with ``conversations``, a list of turns ``{"from": "human", "value": ...}`` and
``{"from": "gpt", "value": ...}``; or with ``instruction`` and ``output``. Only the first question and its answer count.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

FIELD = "train.data"
ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant", "chatgpt")
# One line in so many is held out.
HELD_OUT = 20


class ShareGPT:
    """Pairs of prompt and answer, read on demand.

    Parameters
    ----------
    path : of the file
    held_out : whether `indices` are the lines to measure on, not those to train on

    Raises
    ------
    ValueError
        If the file does not exist.
    """

    def __init__(self, path: str, *, held_out: bool = False) -> None:
        self.path = Path(path).expanduser()
        self._held_out = held_out
        if not self.path.is_file():
            raise ValueError(f"{FIELD}={path!r}: {self.path.absolute()} does not exist; correct the path.")

    @cached_property
    def _offsets(self) -> list[int]:
        """Where each line that is not blank begins."""
        offsets, position = [], 0
        with open(self.path, "rb") as stream:
            for line in stream:
                if line.strip():
                    offsets.append(position)
                position += len(line)
        return offsets

    @cached_property
    def indices(self) -> list[int]:
        """The lines to train on, or those to measure on."""
        every = range(len(self._offsets))
        if len(every) < 2:
            return list(every)
        return [index for index in every if (index % HELD_OUT == 0) == self._held_out]

    def check(self) -> None:
        """Raise ValueError if the file is empty or its first line is not a conversation."""
        if not self._offsets:
            raise ValueError(f"{FIELD}={str(self.path)!r} is empty.")
        self.pair(0)

    def pair(self, index: int) -> tuple[str, str]:
        """Return prompt and answer of a line.

        Raises
        ------
        ValueError
            If the line is not a conversation, naming it.
        """
        with open(self.path, "rb") as stream:
            stream.seek(self._offsets[index])
            line = stream.readline()
        try:
            prompt, answer = _pair(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{FIELD}: line {index + 1} of {self.path} is not a conversation ({type(error).__name__}: {error}); it "
                'must be a JSON object with "conversations", a list of {"from": "human" or "gpt", "value": text}.'
            ) from error
        return prompt, answer


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    if "conversations" not in row:
        prompt, answer = row["instruction"], row["output"]
    else:
        turns = row["conversations"]
        first = next((place for place, turn in enumerate(turns) if turn["from"] in ASKING), None)
        if first is None or first + 1 == len(turns) or turns[first + 1]["from"] not in ANSWERING:
            raise ValueError("no question followed by an answer")
        prompt, answer = turns[first]["value"], turns[first + 1]["value"]
    if not prompt.strip() or not answer.strip():
        raise ValueError("an empty question or answer")
    return prompt, answer
