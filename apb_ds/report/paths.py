"""Keeping places on this machine out of what a run leaves behind: records and logs are passed on, paths are not.

Within the run's own directory and the directory that it was started in, paths become relative; the user's home becomes
``~``; of any other absolute path only the last name stays, as ``.../name``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What somebody has written, or a model: whatever looks like a path there is text.
TEXTS = ("document", "query", "question", "answer", "prediction", "ground_truth")
FILE_MARK = "@"
# Not after a letter, dot, slash or ~: "and/or", "./x", "https://x" and "~/x" are no absolute paths.
ABSOLUTE = re.compile(r"(?<![\w./~])/(?:[\w.+@%=-]+/)*[\w.+@%=-]+")
HIDDEN = "..."


def hide_paths(values: Any, run_dir: Path | None = None) -> Any:
    """Return a record (dicts, lists, strings) in which places on this machine are hidden.

    Parameters
    ----------
    run_dir : the run's own directory
    """
    return _walk(values, _hider(run_dir))


class PathHidingFormatter(logging.Formatter):
    """A formatter of log lines in which places on this machine are hidden."""

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
    """Return what replaces absolute paths in a text."""
    places = [(path, short) for path, short in ((run_dir, "."), (Path.cwd(), "."), (_home(), "~")) if path is not None]
    # Longest first: the run's directory is mostly in the other two.
    known = [(str(path.absolute()), short) for path, short in places]
    patterns = [
        (re.compile(rf"(?<![\w./~]){re.escape(path)}(?![\w.+@%=-])"), short)
        for path, short in sorted(known, key=lambda item: -len(item[0]))
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
    except RuntimeError:  # nobody's
        return None
