"""Keep this machine's paths out of records and logs, which are passed on.

Paths within the run's directory and the working directory become relative, and the home directory becomes ``~``. Of any
other absolute path only the last name stays, as ``.../name``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Written by a person or a model: what looks like a path there is text.
TEXTS = ("document", "query", "system", "question", "answer", "prediction", "ground_truth")
FILE_MARK = "@"
# Not after a letter, dot, slash or ~: "and/or", "./x", "https://x" and "~/x" are not absolute paths.
ABSOLUTE = re.compile(r"(?<![\w./~])/(?:[\w.+@%=-]+/)*[\w.+@%=-]+")
HIDDEN = "..."


def hide_paths(values: Any, run_dir: Path | None = None) -> Any:
    """Return a record (dicts, lists, strings) without this machine's paths.

    Parameters
    ----------
    run_dir : the run's own directory
    """
    return _walk(values, _hider(run_dir))


class PathHidingFormatter(logging.Formatter):
    """Formats log lines without this machine's paths."""

    def format(self, record: logging.LogRecord) -> str:
        return _hider(None)(super().format(record))


def _walk(values: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(values, dict):
        return {
            key: value if key in TEXTS and not _names_a_file(value) else _walk(value, hide)
            for key, value in values.items()
        }
    if isinstance(values, (list, tuple)):
        return [_walk(value, hide) for value in values]
    if isinstance(values, Path):
        return hide(str(values))
    if isinstance(values, str):
        mark = FILE_MARK if _names_a_file(values) else ""
        return mark + hide(values.removeprefix(mark))
    return values


def _names_a_file(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(FILE_MARK) and not value.startswith(2 * FILE_MARK)


def _hider(run_dir: Path | None) -> Callable[[str], str]:
    """Return a function that replaces absolute paths in a text."""
    roots = ((run_dir, "."), (Path.cwd(), "."), (_home(), "~"))
    known = [(str(path.absolute()), short) for path, short in roots if path is not None]
    patterns = [
        (re.compile(rf"(?<![\w./~]){re.escape(path)}(?![\w.+@%=-])"), short)
        for path, short in sorted(known, key=lambda item: -len(item[0]))  # the longest first: they nest
        if path != "/"
    ]

    def hide(text: str) -> str:
        for pattern, short in patterns:
            text = pattern.sub(short, text)
        return ABSOLUTE.sub(lambda found: f"{HIDDEN}/{found[0].rpartition('/')[2]}", text)

    return hide


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry in the password file
        return None
