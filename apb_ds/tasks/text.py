"""Text that a user gives: as it stands, from a file, or from standard input; and what counts as text, see `clean`."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import TextIO

from apb_ds.tasks.jsonl import shortened

FILE_MARK = "@"
STANDARD_INPUT = "-"
ANY_SOURCE = "a text, @FILE for a file's contents, or - for standard input"
SHOWN_CHARACTERS = 100
MAX_PATH = 255  # characters; longer texts are not taken for paths
ESCAPE_HINT = "(A text that begins with @ is written with @@.)"
BYTE_ORDER_MARK = "\ufeff"
# Bytes that a stream could not decode, as Python keeps them (errors="surrogateescape").
UNDECODED = range(0xDC80, 0xDD00)

_SURROGATE = re.compile("[\ud800-\udfff]")
_ADDRESS = re.compile(r"https?://\S+", re.I)
_PATH = re.compile(r"(~|\.{0,2})/\S*|\S+\.(csv|docx?|html?|jsonl?|log|md|pdf|py|rst|tex|tsv|txt|xml|ya?ml)", re.I)


def clean(text: str, *, may_be_blank: bool = False) -> tuple[str, str | None]:
    """Return a text as it is used, and why it cannot be used, or None; for every text, wherever it comes from.

    A byte order mark at the start is not part of the text. White space alone is refused unless `may_be_blank`, and so
    are NUL characters and what is not Unicode.
    """
    text = text.lstrip(BYTE_ORDER_MARK)
    nul = text.find("\0")
    if nul >= 0:
        return text, f"has a NUL character at character {nul}; binary files and UTF-16 must be converted to UTF-8 first"
    surrogate = _SURROGATE.search(text)
    if surrogate:
        code, place = ord(surrogate[0]), surrogate.start()
        if code in UNDECODED:
            return text, f"is not UTF-8: byte {code - 0xDC00:#04x} at character {place}; convert it to UTF-8"
        return text, f"is not Unicode text: half a surrogate pair (\\u{code:04x}) at character {place}"
    if not may_be_blank and not text.strip():
        return text, f"is {'only white space' if text else 'empty'}; give some text"
    return text, None


def check_text(field: str, value: object, accepted: str = ANY_SOURCE) -> str:
    """Return the setting as a string; ValueError if it is not a text, or cannot be used.

    Parameters
    ----------
    accepted : what the setting takes, for messages
    """
    check_quoted(field, value)
    if isinstance(value, (list, tuple, dict)):
        raise ValueError(f"{field}={value!r} is not a text; it must be quoted, as in '{field}=\"a, b\"'.")
    text, problem = clean(value) if isinstance(value, str) else ("", None)
    if not text.strip():
        raise ValueError(f"{field}={value!r} is empty; give {accepted}.")
    if problem:
        raise ValueError(f"{field}={_shown(text)} {problem}.")
    return text


def check_quoted(field: str, value: object) -> None:
    """Raise ValueError for a number or a truth value: in YAML, ``query: 1.10`` is 1.1 and ``query: yes`` is true.

    On the command line, texts are taken as they were typed.
    """
    if isinstance(value, (bool, int, float)):
        shown = str(value).lower() if isinstance(value, bool) else value
        kind = "true or false" if isinstance(value, bool) else "a number"
        key = field.rpartition(".")[2]
        raise ValueError(f'{field}={shown} is {kind}, not a text; quote it in the config file: {key}: "...".')


def check_text_source(field: str, value: str) -> None:
    """Raise ValueError if `value` names a file that does not exist, or is a path whose ``@`` was forgotten."""
    if is_file(value):
        _existing_file(field, value)
    elif _ADDRESS.fullmatch(value):
        raise ValueError(
            f"{field}={value!r} is an address, and nothing is downloaded; save it and give {field}=@FILE. To ask about "
            f"these letters themselves, put a space before them: '{field}=\" {value}\"'."
        )
    elif value != STANDARD_INPUT and is_path(value):
        raise ValueError(
            f"{field}={value!r} is a path; to read the file write {field}=@{value}. To ask about these letters "
            f"themselves, put a space before them: '{field}=\" {value}\"'."
        )


def is_path(value: str, folder: Path | None = None) -> bool:
    """Return whether a text is the path of something that exists, in `folder` if relative, or looks like a path.

    A text with white space at either end is never one.
    """
    if not 0 < len(value) <= MAX_PATH or value != value.strip() or "\n" in value or "://" in value:
        return False
    if _PATH.fullmatch(value):
        return True
    try:
        return (folder or Path()).joinpath(Path(value).expanduser()).exists()
    except (OSError, RuntimeError, ValueError):
        return False


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
        If the file does not exist, cannot be read, is not UTF-8 or contains no text, see `clean`.
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
    text, problem = clean(text)
    if problem:
        raise ValueError(f"{field}={_shown(value)} {problem}.")
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
    return repr(shortened(value, SHOWN_CHARACTERS))


def _decoded(what: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text (at byte {error.start}); convert it first.") from error
