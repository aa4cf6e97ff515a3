"""The questions of a batch, from a JSONL file: checked in one pass that keeps no document in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apb_ds.config import check_integer, suggest

KEYS = ("id", "document", "document_file", "query", "max_new_tokens")
SHOWN_LINES = 5
SHOWN_CHARACTERS = 60
SHOWN_PATH = 300
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What a JSON value is called in an error; the value itself may be a whole document.
JSON_TYPES = {bool: "true or false", int: "an integer", float: "a number", dict: "an object", list: "an array"}


@dataclass(frozen=True)
class Line:
    """One question of the file, without its document.

    Attributes
    ----------
    number : of the line in the file, from 1
    id : as it was given
    query : the question
    max_new_tokens : tokens at most for this answer, or None
    document_digest : SHA-256 of the document's UTF-8 bytes in hexadecimal; None where it cannot be read
    document_bytes : the document's length in UTF-8; 0 where it cannot be read
    problem : why this line cannot be answered, or None
    fingerprint : SHA-256 of digest, query and max_new_tokens: what the answer depends on besides the settings
    offset : bytes from the file's start to the line's
    document_path : the file that holds the document, absolute; None where the line itself holds it
    """

    number: int
    id: str | int
    query: str
    max_new_tokens: int | None
    document_digest: str | None
    document_bytes: int
    problem: str | None
    fingerprint: str
    offset: int = field(repr=False)
    document_path: Path | None = field(repr=False)


@dataclass(frozen=True)
class _Document:
    """What is kept of a document once it has been read."""

    digest: str | None
    num_bytes: int
    problem: str | None


def read_lines(path: Path) -> list[Line]:
    """Read and check the questions in the JSONL file at `path`; blank lines are skipped.

    Each line is an object with ``id`` (string or integer, unique), ``query``, either ``document`` or
    ``document_file`` (a path, relative to the folder of `path`) and, if it wants, ``max_new_tokens``. A null counts as
    not given. A document that cannot be used is the problem of its own line only, see `Line.problem`.

    Raises
    ------
    ValueError
        If the file cannot be read, has no lines, or has lines that are no such objects; naming the first of them.
    """
    folder = path.absolute().parent
    lines: list[Line] = []
    broken: list[str] = []  # the first of them
    num_broken = 0
    numbers: dict[str, int] = {}
    documents: dict[Path, _Document] = {}
    for number, offset, raw in _raw_lines(path):
        try:
            values = _parse(raw, offset)
            _check(values)
            first = numbers.setdefault(str(values["id"]), number)
            if first != number:
                raise ValueError(f"the id {_shown(values['id'])} is on line {first} already; give each line its own.")
            lines.append(_build_line(number, offset, values, folder, documents))
        except ValueError as error:
            num_broken += 1
            if num_broken <= SHOWN_LINES:
                broken.append(f"line {number}: {error}")
    if broken:
        if num_broken > SHOWN_LINES:
            broken.append(f"and {num_broken - SHOWN_LINES} more.")
        raise ValueError("\n  ".join([f"{path}: {num_broken} of its lines cannot be used; correct them.", *broken]))
    if not lines:
        raise ValueError(f"{path} has no lines; give one JSON object a line, with id, document and query.")
    return lines


def read_document(path: Path, line: Line) -> str:
    """Return the document of a `line` that `read_lines` found in the file at `path`, exactly as it stands.

    Raises
    ------
    ValueError
        If it could not be read then or cannot be now, or has changed since.
    """
    if line.document_digest is None:
        raise ValueError(f"{path}, line {line.number}: {line.problem}")
    where = line.document_path or f"{path}, line {line.number}"
    text: object
    try:
        if line.document_path is not None:
            text = line.document_path.read_bytes().decode("utf-8")
        else:
            with path.open("rb") as stream:
                stream.seek(line.offset)
                text = _parse(_content(stream.readline(), line.offset), line.offset).get("document")
    except OSError as error:
        raise ValueError(f"{where}: the document cannot be read any more: {error.strerror}.") from error
    except ValueError:  # not UTF-8, or no JSON, as it was before
        text = None
    if not isinstance(text, str) or _digest(text)[0] != line.document_digest:
        raise ValueError(f"{where}: the document has changed since the run began; run it again.")
    return text


def group_lines(lines: Iterable[Line]) -> list[list[Line]]:
    """Group consecutive lines that ask about the same document; groups are in the order of their first lines.

    Lines with a problem change nothing for the others: they part no group. They join the group of their document if
    it is the one before or after them, and otherwise are a group each.
    """
    groups: list[list[Line]] = []
    group: list[Line] = []
    waiting: list[Line] = []  # lines with a problem that have not found their group
    for line in lines:
        same = bool(group) and line.document_digest == group[0].document_digest
        if line.problem is not None and not same:
            waiting.append(line)
        elif same:
            group.append(line)
        else:
            group = [other for other in waiting if other.document_digest == line.document_digest]
            groups += [[other] for other in waiting if other.document_digest != line.document_digest]
            group.append(line)
            groups.append(group)
            waiting = []
    groups += [[other] for other in waiting]
    return sorted(groups, key=lambda members: members[0].number)


def _raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, byte offset, content) of each line that is not blank."""
    problem = _file_problem(path)
    if problem:
        raise ValueError(f"{path} {problem}; name a JSONL file with one question a line.")
    try:
        with path.open("rb") as stream:
            offset = 0
            for number, raw in enumerate(stream, start=1):
                content = _content(raw, offset)
                if content:
                    yield number, offset, content
                offset += len(raw)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _content(raw: bytes, offset: int) -> bytes:
    """Return a line of the file without its end and, at the file's start, the byte order mark; empty if blank."""
    content = raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw
    return content.rstrip()


def _parse(content: bytes, offset: int) -> dict[str, Any]:
    """Return the object on a line, without what is null."""
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        at = error.start
        raise ValueError(f"not UTF-8: byte {content[at]:#04x} at column {at + 1} (bytes); save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg}, at column {error.colno}; give one JSON object a line.") from error
    except RecursionError as error:
        raise ValueError("no JSON that can be read: nested too deep; give one flat JSON object a line.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{_type_name(values)} and no object; give one JSON object a line.")
    return {key: value for key, value in values.items() if value is not None}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {_shown(twice)} is there twice; give it once.")
    return values


def _check(values: dict[str, Any]) -> None:
    """Raise ValueError unless `values` are those of a question."""
    for key in values:
        if key not in KEYS:
            raise ValueError(f"the key {_shown(key)} is not known; use {', '.join(KEYS)}.{suggest(key, KEYS)}")
    for key in ("id", "query"):
        if key not in values:
            raise ValueError(f"no {key}; every line needs one.")
    if isinstance(values["id"], bool) or not isinstance(values["id"], (str, int)):
        raise ValueError(f"id is {_type_name(values['id'])}, but must be a string or an integer.")
    if _examine(str(values["id"]), "id").digest is None:
        raise ValueError(_examine(str(values["id"]), "id").problem)
    for key in ("query", "document", "document_file"):
        if key in values and not isinstance(values[key], str):
            raise ValueError(f"{key} is {_type_name(values[key])}, but must be a string.")
    if ("document" in values) == ("document_file" in values):
        given = "both document and document_file" if "document" in values else "neither document nor document_file"
        raise ValueError(f"{given}; give one of the two.")
    if "max_new_tokens" in values:
        check_integer("max_new_tokens", values["max_new_tokens"], 1)


def _build_line(
    number: int, offset: int, values: dict[str, Any], folder: Path, documents: dict[Path, _Document]
) -> Line:
    """Return the line of checked `values`; `documents` are those of files that were read before."""
    source = None
    if "document" in values:
        document = _examine(values["document"], "document")
    else:
        source = folder / values["document_file"]
        if source not in documents:
            documents[source] = _read_file(source)
        document = documents[source]
    query, max_new_tokens = values["query"], values.get("max_new_tokens")
    problems = [text for text in (document.problem, _examine(query, "query").problem) if text]
    basis = json.dumps([document.digest, query, max_new_tokens])
    return Line(
        number=number,
        id=values["id"],
        query=query,
        max_new_tokens=max_new_tokens,
        document_digest=document.digest,
        document_bytes=document.num_bytes,
        problem=" ".join(problems) or None,
        fingerprint=hashlib.sha256(basis.encode("ascii")).hexdigest(),
        offset=offset,
        document_path=source,
    )


def _read_file(path: Path) -> _Document:
    name = f"document_file {_shown(str(path), SHOWN_PATH)}"  # by mistake it may be the document itself
    problem = _file_problem(path)
    if problem:
        return _Document(None, 0, f"{name} {problem}; name a text file.")
    try:
        return _examine(path.read_bytes().decode("utf-8"), name)
    except OSError as error:
        return _Document(None, 0, f"{name} cannot be read ({error.strerror}).")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return _Document(None, 0, f"{name} is not UTF-8: byte {byte:#04x} at position {error.start}; convert it.")


def _file_problem(path: Path) -> str | None:
    """Return why there is no file to read at `path`, or None."""
    try:
        if path.is_file():
            return None
        return "is a directory" if path.is_dir() else "is no file" if path.exists() else "is not there"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _examine(text: str, name: str) -> _Document:
    """Return the digest and length of a text, and what makes it one that cannot be used."""
    try:
        digest, num_bytes = _digest(text)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        problem = f"{name} is no Unicode text: half a surrogate pair (\\u{code:04x}) at character {error.start}."
        return _Document(None, 0, problem)
    if not text or text.isspace():
        kind = "only white space" if text else "empty"
        return _Document(digest, num_bytes, f"{name} is {kind}; give some text.")
    return _Document(digest, num_bytes, None)


def _digest(text: str) -> tuple[str, int]:
    encoded = text.encode("utf-8")
    return hashlib.sha256(encoded).hexdigest(), len(encoded)


def _type_name(value: object) -> str:
    return JSON_TYPES.get(type(value), "null" if value is None else "a string")


def _shown(value: object, length: int = SHOWN_CHARACTERS) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."
