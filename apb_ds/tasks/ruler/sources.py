"""What a user brings for the tasks that the harness would download: essays and questions, from `task.data_dir`."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from apb_ds.tasks.ruler.names import ESSAY_TASKS, QUESTION_FILES
from apb_ds.tasks.text import expand_path


def source_files(task: str, data_dir: str | None) -> list[Path]:
    """Return the files that a task is made from, in the order of their names; none for most tasks.

    Raises
    ------
    ValueError
        If one is missing, naming it.
    """
    if task not in ESSAY_TASKS and task not in QUESTION_FILES:
        return []
    wanted = QUESTION_FILES.get(task, "*.txt")
    if data_dir is None:
        what = f"the file {wanted}" if task in QUESTION_FILES else "text files (*.txt) to hide needles in"
        raise ValueError(f"task.data_dir is missing: {task} needs a folder with {what}.")
    folder = expand_path("task.data_dir", data_dir)
    try:
        if not folder.is_dir():
            raise ValueError(f"task.data_dir={data_dir!r}: there is no folder {folder.absolute()}.")
        files = sorted(file for file in folder.glob(wanted) if file.is_file())
    except OSError as error:
        raise ValueError(f"task.data_dir={data_dir!r}: cannot read {folder.absolute()} ({error.strerror}).") from error
    if not files:
        raise ValueError(f"task.data_dir={data_dir!r}: {task} needs {folder.absolute() / wanted}, which is not there.")
    return files


def hash_files(files: list[Path]) -> str:
    """Return a hash of the files' contents, in this order; empty for none."""
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(_read_bytes(file)).digest())
    return digest.hexdigest()


def read_words(files: list[Path]) -> list[str]:
    """Return the words of the texts, as the harness cuts its essays: at any white space.

    Raises
    ------
    ValueError
        If a file is no text, or there is no word in any of them.
    """
    text = " ".join(_read_text(file) for file in files)
    words = re.sub(r"\s+", " ", text).strip().split(" ")
    if words == [""]:
        raise ValueError(f"task.data_dir: there is no word in {files[0].absolute().parent}/*.txt.")
    return words


def read_questions(file: Path) -> Any:
    """Return what is in a JSON file.

    Raises
    ------
    ValueError
        If it is no JSON.
    """
    try:
        return json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"task.data_dir: {file.absolute()} is no JSON ({error}); get the original file.") from error


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
