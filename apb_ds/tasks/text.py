"""Text that a user gives: as it stands, from a file, or from standard input."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TextIO

FILE_MARK = "@"
STANDARD_INPUT = "-"
SHOWN_CHARACTERS = 100
ESCAPE_HINT = "(A text that begins with @ is written with @@.)"


def check_text(field: str, value: object) -> str:
    """Return the setting as a string; ValueError if it is empty, or a list or mapping.

    A number or truth value on the command line arrives as one.
    """
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, (int, float)):
        value = str(value)
    if isinstance(value, (list, tuple, dict)):
        raise ValueError(f"{field}={value!r} is not a text; it must be quoted, as in '{field}=\"a, b\"'.")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{field}={value!r} is empty; give a text, @FILE for a file's contents, or - for standard input."
        )
    return value


def check_text_source(field: str, value: str) -> None:
    """Raise ValueError if `value` names a file that does not exist."""
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
        If the file does not exist, cannot be read, is not UTF-8 or contains no text.
    """
    if value == STANDARD_INPUT:
        if sys.stdin is None:
            raise ValueError(f"{field}=-: standard input is closed; pipe the text into it, or give @FILE.")
        try:
            text = _decoded(f"{field}=-: standard input", _read_once(sys.stdin))
        except OSError as error:
            raise ValueError(f"{field}=-: cannot read standard input ({error.strerror}).") from error
    elif is_file(value):
        path = _existing_file(field, value)
        try:
            text = _decoded(f"{field}={value!r}: {path.absolute()}", path.read_bytes())
        except OSError as error:
            raise ValueError(f"{field}={value!r}: cannot read {path.absolute()} ({error.strerror}).") from error
    else:
        text = value.removeprefix(FILE_MARK)
    if not text.strip():
        raise ValueError(f"{field}={value!r} is empty; give some text.")
    return text


@functools.lru_cache(maxsize=1)
def _read_once(stream: TextIO) -> bytes:
    """Return all of the stream, which the jobs of a sweep share."""
    return stream.buffer.read()


def expand_path(field: str, value: str) -> Path:
    """Return the path that `value` names, with ``~`` and ``~user`` expanded; ValueError for an unknown user."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{field}={value!r}: there is no home directory for its ~; write the path out.") from error


def find_folder(field: str, value: str) -> Path:
    """Return the folder that `value` names; ValueError if it does not exist."""
    folder = expand_path(field, value)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:
        raise ValueError(f"{field}={value!r}: cannot read {folder.absolute()} ({error.strerror}).") from error
    raise ValueError(f"{field}={value!r}: there is no folder {folder.absolute()}.")


def _existing_file(field: str, value: str) -> Path:
    path = expand_path(field, value.removeprefix(FILE_MARK))
    try:
        if path.is_dir():
            raise ValueError(f"{field}={value!r}: {path.absolute()} is a directory; name a text file.")
        found = path.exists()
    except OSError as error:  # a name that is too long, a folder without read permission
        raise ValueError(
            f"{field}={_shown(value)}: cannot read {_shown(str(path.absolute()))} ({error.strerror}). {ESCAPE_HINT}"
        ) from error
    if not found:
        raise ValueError(f"{field}={value!r}: there is no file {path.absolute()}. {ESCAPE_HINT}")
    return path


def _shown(value: str) -> str:
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "...")


def _decoded(what: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text (at byte {error.start}); convert it first.") from error
