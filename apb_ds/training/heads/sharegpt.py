"""Conversations from a JSONL file in ShareGPT's format, as LongAlpaca comes in.

Each line is a JSON object with ``conversations``, a list of turns ``{"from": "human", "value": ...}`` and
``{"from": "gpt", "value": ...}``; or with ``instruction`` and ``output``. The first question with its answer is used.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

FIELD = "train.data"
ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant", "chatgpt")
# One line in so many is set aside to measure on.
HELD_OUT = 20


class ShareGPT:
    """Pairs of prompt and answer, read when they are asked for.

    Parameters
    ----------
    path : of the file

    Raises
    ------
    ValueError
        If there is no such file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ValueError(f"{FIELD}={path!r}: there is no such file ({self.path.absolute()}); correct the path.")

    @cached_property
    def _offsets(self) -> list[int]:
        """Where each line with something in it begins."""
        offsets, position = [], 0
        with open(self.path, "rb") as stream:
            for line in stream:
                if line.strip():
                    offsets.append(position)
                position += len(line)
        return offsets

    def indices(self, *, held_out: bool) -> list[int]:
        """Return which lines to train on, or which ones to measure on."""
        every = range(len(self._offsets))
        if len(every) < 2:
            return list(every)
        return [index for index in every if (index % HELD_OUT == 0) == held_out]

    def check(self) -> None:
        """Raise ValueError if there is nothing in the file, or its first line is no conversation."""
        if not self._offsets:
            raise ValueError(f"{FIELD}={str(self.path)!r} is empty.")
        self.pair(0)

    def pair(self, index: int) -> tuple[str, str]:
        """Return prompt and answer of a line.

        Raises
        ------
        ValueError
            If it has none, naming the line.
        """
        with open(self.path, "rb") as stream:
            stream.seek(self._offsets[index])
            line = stream.readline()
        try:
            prompt, answer = _pair(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{FIELD}: conversation {index + 1} of {self.path} is none ({type(error).__name__}: {error}); each "
                'line is a JSON object with "conversations", a list of {"from": "human" or "gpt", "value": text}.'
            ) from error
        return prompt, answer


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    if "conversations" not in row:
        prompt, answer = row["instruction"], row["output"]
    else:
        turns = row["conversations"]
        first = next((place for place, turn in enumerate(turns) if turn["from"] in ASKING), None)
        if first is None or first + 1 == len(turns) or turns[first + 1]["from"] not in ANSWERING:
            raise ValueError("no question that is followed by an answer")
        prompt, answer = turns[first]["value"], turns[first + 1]["value"]
    if not prompt.strip() or not answer.strip():
        raise ValueError("an empty question or answer")
    return prompt, answer
