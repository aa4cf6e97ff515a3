"""Text that a user gives: as it stands, from a file, or from standard input."""

from __future__ import annotations

import sys
from pathlib import Path

FILE_MARK = "@"
STANDARD_INPUT = "-"


def check_text(field: str, value: object) -> str:
    """Return the setting as a string: a number or truth value on the command line arrives as one.

    Raises
    ------
    ValueError
        If nothing is given.
    """
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{field}={value!r} is empty; give a text, @FILE for a file's contents, or - for standard input."
        )
    return value


def check_text_source(field: str, value: str) -> None:
    """Raise ValueError if `value` names a file that is not there."""
    if is_file(value):
        _existing_file(field, value)


def is_file(value: str) -> bool:
    """Return whether the setting names a file; ``@@`` begins a text that begins with ``@``."""
    return value.startswith(FILE_MARK) and not value.startswith(2 * FILE_MARK)


def read_text(field: str, value: str) -> str:
    """Return the text of a setting.

    Parameters
    ----------
    field : its name, for messages
    value : the text itself; ``@FILE`` for a file's contents (UTF-8, relative to the current directory); ``-`` for all
        of standard input. A text that begins with ``@`` is written with ``@@``.

    Raises
    ------
    ValueError
        If the file is not there, cannot be read, is not UTF-8 or has no text in it.
    """
    if value == STANDARD_INPUT:
        text = _decoded(f"{field}=-: standard input", sys.stdin.buffer.read())
    elif is_file(value):
        path = _existing_file(field, value)
        try:
            text = _decoded(f"{field}={value!r}: {path.absolute()}", path.read_bytes())
        except OSError as error:
            raise ValueError(f"{field}={value!r}: cannot read {path.absolute()} ({error.strerror}).") from error
    else:
        text = value.removeprefix(FILE_MARK)
    if not text.strip():
        raise ValueError(f"{field}={value!r} is empty: there is no text in it.")
    return text


def _existing_file(field: str, value: str) -> Path:
    path = Path(value.removeprefix(FILE_MARK)).expanduser()
    if path.is_dir():
        raise ValueError(f"{field}={value!r}: {path.absolute()} is a directory; name a text file.")
    if not path.exists():
        raise ValueError(
            f"{field}={value!r}: there is no file {path.absolute()}. (A text that begins with @ is written with @@.)"
        )
    return path


def _decoded(what: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text (at byte {error.start}); convert it first.") from error
