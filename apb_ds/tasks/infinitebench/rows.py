"""The rows of InfiniteBench's JSONL files, read one by one and checked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb_ds.tasks.infinitebench.names import CHOICE_TASKS, LETTERS
from apb_ds.tasks.jsonl import numbered_lines, parse_object, shortened
from apb_ds.tasks.text import find_folder

# What prompts take from the question.
FUNCTION_CALL = re.compile(r"func_[0-9]+\(-?[0-9]+\)")
WANTED_NUMBER = re.compile(r"The .+ of")
PATTERNS = {
    "code_run": (FUNCTION_CALL, "a call such as func_12(3)"),
    "math_find": (WANTED_NUMBER, "which number is wanted, as in 'The largest number of the list is:'"),
}
# Tasks that ask the same about every row and ignore its input.
WITHOUT_QUESTION = ("longdialogue_qa_eng", "longbook_sum_eng", "code_debug", "math_calc")
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes
    ----------
    id : as it stands in the file
    context : the long text
    question : the row's ``input``
    answers : the right answers, numbers as JSON writes them. Choice tasks: the option and its letter. math_calc: all
        values
    options : the four options of choice tasks, else empty
    """

    id: str | int
    context: str
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...]


def find_file(task: str, data_dir: str | None) -> Path:
    """Return the file of a task; ValueError if it does not exist."""
    name = f"{task}.jsonl"
    if data_dir is None:
        raise ValueError(
            f"task.data_dir is missing: {task} needs a folder with InfiniteBench's {name} (from its dataset on the "
            "Hugging Face hub, xinrongzhang2022/InfiniteBench)."
        )
    file = find_folder("task.data_dir", data_dir) / name
    try:
        found = file.is_file()
    except OSError as error:
        raise ValueError(f"task.data_dir={data_dir!r}: cannot read {file.absolute()} ({error.strerror}).") from error
    if not found:
        raise ValueError(f"task.data_dir={data_dir!r}: {task} needs {file.absolute()}, which does not exist.")
    return file


def read_rows(task: str, file: Path, num_rows: int) -> Iterator[Row]:
    """Yield the first `num_rows` rows of a file, all if it has fewer; blank lines are skipped.

    Raises
    ------
    ValueError
        If the file cannot be read, has no rows, or for a bad row, naming its line.
    """
    count = 0
    try:
        for number, _, content in itertools.islice(numbered_lines(file), num_rows):
            try:
                row = build_row(task, parse_object(content))
            except ValueError as error:
                raise ValueError(f"task.data_dir: {file.absolute()}, line {number}: {error}") from error
            yield row
            count += 1
    except OSError as error:
        raise ValueError(f"task.data_dir: cannot read {file.absolute()} ({error.strerror}).") from error
    if not count:
        raise ValueError(f"task.data_dir: {file.absolute()} has no rows; get the original file.")


def build_row(task: str, values: dict[str, Any]) -> Row:
    """Return the checked row of a task; ValueError if something is missing or of another kind."""
    identity = values.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise ValueError(f"id={_shown(identity)} must be a text or an integer.")
    context = _text("context", values.get("context"))
    question = "" if task in WITHOUT_QUESTION else _text("input", values.get("input"))
    pattern, what = PATTERNS.get(task, (None, ""))
    if pattern is not None and pattern.search(question) is None:
        raise ValueError(f"input={_shown(question)} does not say {what}.")
    answer = values.get("answer")
    if task in CHOICE_TASKS:
        options = _options(values.get("options"))
        return Row(identity, context, question, _right_option(answer, options), options)
    answers = _numbers(task, answer) if task in ("code_run", "math_find", "math_calc") else _texts(answer)
    return Row(identity, context, question, answers, ())


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _text(name: str, value: Any) -> str:
    if not _is_text(value):
        raise ValueError(f"{name}={_shown(value)} must be a text that is not blank.")
    return value


def _texts(answer: object) -> tuple[str, ...]:
    """Return the right answers, any of which is enough."""
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(map(_is_text, answers)):
        raise ValueError(f"answer={_shown(answer)} must be a text or a list of texts, none of them blank.")
    return tuple(answers)


def _numbers(task: str, answer: object) -> tuple[str, ...]:
    """Return the right numbers as text: all of them for math_calc, else one."""
    numbers = answer if isinstance(answer, list) else [answer]
    if task == "math_calc" and len(numbers) == 1 and isinstance(numbers[0], list):
        numbers = numbers[0]
    kinds = (int, float) if task == "math_find" else int
    if not numbers or not all(isinstance(one, kinds) and not isinstance(one, bool) for one in numbers):
        kind = "numbers" if task == "math_find" else "integers"
        raise ValueError(f"answer={_shown(answer)} must be a list of {kind}.")
    if task != "math_calc" and len(numbers) > 1:
        raise ValueError(f"answer={_shown(answer)} must be one number.")
    return tuple(json.dumps(one) for one in numbers)


def _options(options: object) -> tuple[str, ...]:
    if not isinstance(options, list) or len(options) != len(LETTERS) or not all(map(_is_text, options)):
        raise ValueError(f"options={_shown(options)} must be a list of {len(LETTERS)} texts, none of them blank.")
    return tuple(options)


def _right_option(answer: object, options: tuple[str, ...]) -> tuple[str, str]:
    """Return the right option and its letter; some files give only the option, others both."""
    given = answer if isinstance(answer, list) else [answer]
    if len(given) == 2 and isinstance(given[0], str) and given[1] in tuple(LETTERS):
        return given[0], str(given[1])
    if len(given) == 1 and given[0] in options:
        return str(given[0]), LETTERS[options.index(given[0])]
    raise ValueError(f"answer={_shown(answer)} must be one of the options, or an option and its letter.")


def _shown(value: object) -> str:
    """Return a value short enough for a message: it may be a whole book."""
    return shortened(json.dumps(value, ensure_ascii=True), SHOWN_CHARACTERS)
