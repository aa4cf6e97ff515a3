"""Reading JSONL files that users give: one object a line, any other line refused in a sentence that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What a JSON value is called in an error; the value itself may be a whole document.
JSON_TYPES = {bool: "true or false", int: "an integer", float: "a number", dict: "an object", list: "an array"}


def file_problem(path: Path) -> str | None:
    """Return why there is no file to read at `path`, or None."""
    try:
        if path.is_file():
            return None
        return "is a directory" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, byte offset, content) of each line that is not blank."""
    with path.open("rb") as stream:
        offset = 0
        for number, raw in enumerate(stream, start=1):
            content = strip_line(raw, offset)
            if content:
                yield number, offset, content
            offset += len(raw)


def strip_line(raw: bytes, offset: int) -> bytes:
    """Return a line without trailing white space and, at the file's start, the byte order mark."""
    return (raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw).rstrip()


def parse_object(content: bytes) -> dict[str, Any]:
    """Return the object on a line; ValueError for anything else, or a repeated key."""
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        at = error.start
        raise ValueError(f"not UTF-8: byte {content[at]:#04x} at column {at + 1} (bytes); save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, at column {error.colno}; give one JSON object a line.") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep; give one flat JSON object a line.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{type_name(values)}, not an object; give one JSON object a line.")
    return values


def type_name(value: object) -> str:
    """Return what JSON calls a value's type."""
    return JSON_TYPES.get(type(value), "null" if value is None else "a string")


def shortened(text: str, length: int) -> str:
    """Return a text cut to a length that fits a message."""
    return text if len(text) <= length else text[:length] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {shortened(repr(twice), 60)} is given twice; give it once.")
    return values
