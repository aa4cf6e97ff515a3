"""The questions of a batch, from a JSONL file: checked in one pass that keeps no document in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apb_ds.config import check_integer, suggest
from apb_ds.tasks.jsonl import file_problem, numbered_lines, parse_object, shortened, strip_line, type_name
from apb_ds.tasks.text import clean, is_path

KEYS = ("id", "document", "document_file", "query", "max_new_tokens")
SHOWN_LINES = 5
SHOWN_CHARACTERS = 60
SHOWN_PATH = 300


@dataclass(frozen=True)
class Line:
    """One question of the file, without its document.

    Attributes
    ----------
    number : the line's number in the file, from 1
    id : as given
    query : the question
    max_new_tokens : tokens of this answer at most, or None
    document_digest : SHA-256 of the document's UTF-8 bytes in hexadecimal; None if it cannot be used
    document_bytes : the document's length in UTF-8; 0 if it cannot be used
    problem : why this line cannot be answered, or None
    fingerprint : SHA-256 of digest, query and max_new_tokens: what the answer depends on besides the settings
    offset : bytes from the file's start to the line's
    document_path : the file that holds the document, absolute; None if the line itself holds it
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
class _Digest:
    """What is kept of a text once it has been read; `problem` says why it cannot be used."""

    digest: str | None
    num_bytes: int
    problem: str | None


def read_lines(path: Path) -> list[Line]:
    """Read and check the questions in the JSONL file at `path`; blank lines are skipped.

    Each line is an object with ``id`` (string or integer, unique), ``query``, either ``document`` or
    ``document_file`` (a path, relative to the folder of `path`) and optionally ``max_new_tokens``. A null counts as
    not given. A document that cannot be used is a problem of its own line only, see `Line.problem`.

    Raises
    ------
    ValueError
        If the file cannot be read, has no lines, or has lines that are not such objects; names the first of them.
    """
    problem = file_problem(path)
    if problem:
        raise ValueError(f"{path} {problem}; name a JSONL file with one question a line.")
    folder = path.absolute().parent
    lines: list[Line] = []
    broken: list[str] = []  # the first of them
    num_broken = 0
    numbers: dict[str, int] = {}
    documents: dict[Path, _Digest] = {}
    try:
        for number, offset, content in numbered_lines(path):
            try:
                values = _given(parse_object(content))
                _check(values)
                first = numbers.setdefault(str(values["id"]), number)
                if first != number:
                    raise ValueError(f"the id {_shown(values['id'])} is on line {first} already; give another.")
                lines.append(_build_line(number, offset, values, folder, documents))
            except ValueError as error:
                num_broken += 1
                if num_broken <= SHOWN_LINES:
                    broken.append(f"line {number}: {error}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if broken:
        if num_broken > SHOWN_LINES:
            broken.append(f"and {num_broken - SHOWN_LINES} more.")
        raise ValueError("\n  ".join([f"{path}: {num_broken} of its lines cannot be used; correct them.", *broken]))
    if not lines:
        raise ValueError(f"{path} has no lines; give one JSON object a line, with id, document and query.")
    return lines


def read_document(path: Path, line: Line) -> str:
    """Return the document of a `line` that `read_lines` found in the file at `path`.

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
                text = parse_object(strip_line(stream.readline(), line.offset)).get("document")
    except OSError as error:
        raise ValueError(f"{where}: the document can no longer be read: {error.strerror}.") from error
    except ValueError:  # no longer UTF-8 or JSON
        text = None
    text = clean(text)[0] if isinstance(text, str) else ""
    if _digest(text)[0] != line.document_digest:
        raise ValueError(f"{where}: the document has changed since the job began; run it again.")
    return text


def group_lines(lines: Iterable[Line]) -> list[list[Line]]:
    """Group consecutive lines about the same document; groups are in the order of their first lines.

    A line with a problem does not split a group. It joins the group before or after it if that has the same document,
    and is a group by itself otherwise.
    """
    groups: list[list[Line]] = []
    group: list[Line] = []
    waiting: list[Line] = []  # lines with a problem whose group is not known yet
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


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _check(values: dict[str, Any]) -> None:
    """Raise ValueError unless `values` are those of a question."""
    for key in values:
        if key not in KEYS:
            raise ValueError(f"the key {_shown(key)} is not known; use {', '.join(KEYS)}.{suggest(key, KEYS)}")
    for key in ("id", "query"):
        if key not in values:
            raise ValueError(f"no {key}; every line needs one.")
    if isinstance(values["id"], bool) or not isinstance(values["id"], (str, int)):
        raise ValueError(f"id is {type_name(values['id'])}, but must be a string or an integer.")
    problem = clean(str(values["id"]), may_be_blank=True)[1]
    if problem:
        raise ValueError(f"id {problem}.")
    for key in ("query", "document", "document_file"):
        if key in values and not isinstance(values[key], str):
            raise ValueError(f"{key} is {type_name(values[key])}, but must be a string.")
    if ("document" in values) == ("document_file" in values):
        given = "both document and document_file" if "document" in values else "neither document nor document_file"
        raise ValueError(f"{given}; give one of the two.")
    if "max_new_tokens" in values:
        check_integer("max_new_tokens", values["max_new_tokens"], 1)


def _build_line(number: int, offset: int, values: dict[str, Any], folder: Path, documents: dict[Path, _Digest]) -> Line:
    """Return the line of checked `values`; `documents` are those of files read so far."""
    source = None
    if "document" in values:
        document = _examine(values["document"], "document")
        if is_path(values["document"], folder):
            why = (
                f"document is a path, {_shown(values['document'])}; name the file as document_file. If these letters "
                "themselves are the document, put a space before them."
            )
            document = _Digest(None, 0, why)
    else:
        source = folder / values["document_file"]
        if source not in documents:
            documents[source] = _read_file(source)
        document = documents[source]
    (query, problem), max_new_tokens = clean(values["query"]), values.get("max_new_tokens")
    problems = [text for text in (document.problem, problem and f"query {problem}.") if text]
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


def _read_file(path: Path) -> _Digest:
    name = f"document_file {_shown(str(path), SHOWN_PATH)}"  # by mistake it may be the document itself
    problem = file_problem(path)
    if problem:
        return _Digest(None, 0, f"{name} {problem}; name a text file.")
    try:
        return _examine(path.read_bytes().decode("utf-8"), name)
    except OSError as error:
        return _Digest(None, 0, f"{name} cannot be read ({error.strerror}).")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return _Digest(None, 0, f"{name} is not UTF-8: byte {byte:#04x} at position {error.start}; convert it.")


def _examine(text: str, name: str) -> _Digest:
    """Return a text's digest and length, and why it cannot be used, if so."""
    text, problem = clean(text)
    if problem:
        return _Digest(None, 0, f"{name} {problem}.")
    return _Digest(*_digest(text), None)


def _digest(text: str) -> tuple[str, int]:
    encoded = text.encode("utf-8")
    return hashlib.sha256(encoded).hexdigest(), len(encoded)


def _shown(value: object, length: int = SHOWN_CHARACTERS) -> str:
    return shortened(repr(value), length)
