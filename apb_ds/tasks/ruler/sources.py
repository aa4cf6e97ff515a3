"""Files for the tasks whose data the harness would download: essays and questions, from `task.data_dir`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from apb_ds.tasks.ruler.names import ESSAY_TASKS, QUESTION_FILES
from apb_ds.tasks.text import find_folder


def source_files(task: str, data_dir: str | None) -> list[Path]:
    """Return the files that a task is made from, by name; none for most tasks. ValueError if one is missing."""
    if task not in ESSAY_TASKS and task not in QUESTION_FILES:
        return []
    wanted = QUESTION_FILES.get(task, "*.txt")
    if data_dir is None:
        what = f"the file {wanted}" if task in QUESTION_FILES else "text files (*.txt) to hide needles in"
        raise ValueError(f"task.data_dir is missing: {task} needs a folder with {what}.")
    folder = find_folder("task.data_dir", data_dir)
    try:
        files = sorted(file for file in folder.glob(wanted) if file.is_file())
    except OSError as error:
        raise ValueError(f"task.data_dir={data_dir!r}: cannot read {folder.absolute()} ({error.strerror}).") from error
    if not files:
        path = folder.absolute() / wanted
        raise ValueError(f"task.data_dir={data_dir!r}: {task} needs {path}, which does not exist.")
    return files


def hash_files(files: list[Path]) -> str:
    """Return a hash of the files' contents, in this order; empty for no files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(_read_bytes(file)).digest())
    return digest.hexdigest() if files else ""


def read_words(files: list[Path]) -> list[str]:
    """Return the words of the texts, split at white space like the harness's essays.

    Raises
    ------
    ValueError
        If a file is not UTF-8 text, or none of them contains a word.
    """
    words = " ".join(_read_text(file) for file in files).split()
    if not words:
        raise ValueError(f"task.data_dir: there are no words in {files[0].absolute().parent}/*.txt.")
    return words


def read_questions(file: Path) -> Any:
    """Return the contents of a JSON file; ValueError if it is not JSON."""
    try:
        return json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"task.data_dir: {file.absolute()} is not JSON ({error}); get the original file.") from error


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"task.data_dir: {file.absolute()} is not UTF-8 text (at byte {error.start}).") from error


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"task.data_dir: cannot read {file.absolute()} ({error.strerror}).") from error
