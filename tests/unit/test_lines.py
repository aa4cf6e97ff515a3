"""Questions from a JSONL file: what is read, what is refused, and what concerns one line only."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from apb_ds.tasks.lines import Line, group_lines, read_document, read_lines


def write(folder: Path, *lines: dict[str, Any] | str | bytes, end: bytes = b"\n") -> Path:
    """Write the lines, objects as JSON, and return the file."""
    path = folder / "questions.jsonl"
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"".join(line + end for line in encoded))
    return path


def question(key: str | int = "a", document: str = "Text.", query: str = "Why?", **more: Any) -> dict[str, Any]:
    return {"id": key, "document": document, "query": query, **more}


def asked_of(key: str | int, file: Path | str, query: str = "Why?") -> dict[str, Any]:
    return {"id": key, "document_file": str(file), "query": query}


def test_reads_lines(tmp_path: Path) -> None:
    text = "Übung\r\n macht  \n"  # used unchanged: no line end translated, nothing stripped
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_bytes(text.encode())
    path = write(tmp_path, question("a", text, max_new_tokens=7), "", " \t", asked_of(2, "texts/one.txt", "Wer?"))
    first, second = read_lines(path)
    assert (first.number, first.id, first.query, first.max_new_tokens, first.problem) == (1, "a", "Why?", 7, None)
    assert (second.number, second.id, second.query, second.max_new_tokens) == (4, 2, "Wer?", None)
    assert first.document_digest == second.document_digest == hashlib.sha256(text.encode()).hexdigest()
    assert first.document_bytes == second.document_bytes == len(text.encode())
    assert read_document(path, first) == read_document(path, second) == text
    assert text not in repr(vars(first))  # no document is kept


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_mark_and_line_ends(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path, question(1, "one\u2028more"), question(2, "two"), end=end)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().removesuffix(end))
    lines = read_lines(path)
    assert [read_document(path, line) for line in lines] == ["one\u2028more", "two"]


def test_byte_order_mark_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfText")
    path = write(tmp_path, asked_of(1, "one.txt", "\ufeffWhy?"), question(2, "\ufeffText"), question(3, "Text"))
    lines = read_lines(path)
    assert [read_document(path, line) for line in lines] == ["Text"] * 3
    assert len({line.fingerprint for line in lines}) == 1 and lines[0].query == "Why?"


def test_null_is_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, question("a", document_file=None, max_new_tokens=None))
    assert read_lines(path) == read_lines(write(tmp_path, question("a")))


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.txt").write_text("Text")
    write(tmp_path / "data", asked_of(1, "one.txt"))
    monkeypatch.chdir(tmp_path)
    path = Path("data/questions.jsonl")
    line = read_lines(path)[0]
    assert line.problem is None
    monkeypatch.chdir("/")
    assert read_document(tmp_path / path, line) == "Text"


def test_a_document_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_text("Text")
    path = write(tmp_path, *(asked_of(number, "one.txt") for number in range(5)))
    read = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.name) or plain(self))
    assert len({line.document_digest for line in read_lines(path)}) == 1
    assert read == ["one.txt"]


BROKEN: list[tuple[str, dict[str, Any] | str | bytes, str]] = [
    ("json", '{"id": 1,', "not JSON: Expecting property name enclosed in double quotes, at column 10;"),
    ("two objects", "{} {}", "not JSON: Extra data, at column 4;"),
    ("nested", "[" * 100_000, "nested too deep"),
    ("array", "[1]", "an array, not an object"),
    ("string", '"text"', "a string, not an object"),
    ("null", "null", "null, not an object"),
    ("latin-1", b'{"id": "\xfc"}', "not UTF-8: byte 0xfc at column 9 (bytes)"),
    ("no id", {"document": "d", "query": "q"}, "no id; every line needs one"),
    ("null id", question() | {"id": None}, "no id; every line needs one"),
    ("float id", question() | {"id": 1.0}, "id is a number, but must be a string or an integer"),
    ("bool id", question() | {"id": True}, "id is true or false, but must be a string or an integer"),
    ("id no text", question("\ud800"), "id is not Unicode text: half a surrogate pair (\\ud800) at character 0"),
    ("no query", {"id": 1, "document": "d"}, "no query; every line needs one"),
    ("query type", question() | {"query": ["q"]}, "query is an array, but must be a string"),
    ("document type", question() | {"document": {"text": "d"}}, "document is an object, but must be a string"),
    ("file type", {"id": 1, "query": "q", "document_file": 3}, "document_file is an integer, but must be a string"),
    ("both", question(document_file="x"), "both document and document_file; give one of the two"),
    ("neither", {"id": 1, "query": "q"}, "neither document nor document_file; give one of the two"),
    ("tokens 0", question(max_new_tokens=0), "max_new_tokens=0 must be an integer of at least 1"),
    ("tokens bool", question(max_new_tokens=True), "max_new_tokens=True must be an integer of at least 1"),
    ("tokens text", question(max_new_tokens="9"), "max_new_tokens='9' must be an integer of at least 1"),
    ("unknown", question(max_tokens=3), "the key 'max_tokens' is not known; use id, document, document_file, query"),
    ("nearest", {"id": 1, "document": "d", "qurey": "q"}, "Did you mean 'query'?"),
    ("twice", '{"id": 1, "id": 2, "document": "d", "query": "q"}', "the key 'id' is given twice"),
    ("same id", question("good"), "the id 'good' is on line 1 already"),
]


@pytest.mark.parametrize(("line", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_line_is_named(tmp_path: Path, line: dict[str, Any] | str | bytes, message: str) -> None:
    path = write(tmp_path, question("good"), "", line, question("other"))
    with pytest.raises(ValueError) as caught:
        read_lines(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 1 of its lines cannot be used; correct them.\n  line 3: "), text
    assert message in text
    assert "more." not in text


def test_ids_differ_as_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: the id '1' is on line 1 already"):
        read_lines(write(tmp_path, question(1), question("1")))


def test_first_broken_lines_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read_lines(write(tmp_path, *(["{"] * 8)))
    text = str(caught.value)
    assert [number for number in range(1, 9) if f"line {number}:" in text] == [1, 2, 3, 4, 5]
    assert "8 of its lines" in text and text.endswith("\n  and 3 more.")


def test_input_that_cannot_be_read(tmp_path: Path) -> None:
    empty = write(tmp_path, "", "  ")
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "missing.jsonl", "missing.jsonl does not exist; name a JSONL file"),
        (tmp_path, "is a directory; name a JSONL file"),
        (tmp_path / "pipe", "pipe is not a file; name a JSONL file"),
        (tmp_path / ("long" * 200), "cannot be read (File name too long); name a JSONL file"),
        (empty, "questions.jsonl has no lines; give one JSON object a line"),
    ]:
        with pytest.raises(ValueError) as caught:
            read_lines(path)
        assert message in str(caught.value)


def test_problem_of_one_line_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"abc\xfc")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16-le"))
    cases: list[tuple[dict[str, Any], str, bool]] = [  # line, problem, whether the document is known
        (asked_of("missing", "none.txt"), "none.txt' does not exist; name a text file", False),
        (asked_of("folder", "folder"), "folder' is a directory; name a text file", False),
        (asked_of("no name", "a\0b"), "does not exist; name a text file", False),
        (asked_of("long", "text " * 200), "cannot be read (File name too long); name a text file", False),
        (asked_of("latin-1", "latin.txt"), "latin.txt' is not UTF-8: byte 0xfc at position 3", False),
        (asked_of("empty file", "empty.txt"), "empty.txt' is empty; give some text", False),
        (asked_of("only a mark", "mark.txt"), "mark.txt' is empty; give some text", False),
        (asked_of("UTF-16", "wide.txt"), "wide.txt' has a NUL character at character 1", False),
        (question("empty", ""), "document is empty; give some text", False),
        (question("blank", " \n\u3000"), "document is only white space; give some text", False),
        (question("a path", "/no/such"), "document is a path, '/no/such'; name the file as document_file", False),
        (question("a file's name", "wide.txt"), "document is a path, 'wide.txt'", False),
        (question("half", "ab\ud83d"), "document is not Unicode text: half a surrogate pair (\\ud83d) at", False),
        (question("no query", query=""), "query is empty; give some text", True),
        (question("blank query", query=" \n"), "query is only white space; give some text", True),
        (question("half query", query="\ud83d"), "query is not Unicode text", True),
    ]
    lines = read_lines(write(tmp_path, question("first"), *(case[0] for case in cases), question("last")))
    assert [line.id for line in lines if line.problem is None] == ["first", "last"]
    for line, (_, message, known) in zip(lines[1:-1], cases, strict=True):
        assert line.problem is not None and message in line.problem, (line.id, line.problem)
        assert (line.document_digest is not None) == known, line.id
        assert known or line.document_bytes == 0
        assert len(line.problem) < 600


def test_both_problems_are_named(tmp_path: Path) -> None:
    (line,) = read_lines(write(tmp_path, question(document="", query=" ")))
    assert line.problem == "document is empty; give some text. query is only white space; give some text."


def test_fingerprint_is_of_what_the_answer_depends_on(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Text.")
    base = question("a")
    same = [base, question("b"), asked_of("c", "one.txt")]
    other = [
        question("d", document="Text"),
        question("e", query="Why"),
        question("f", max_new_tokens=1),
        question("g", max_new_tokens=2),
        asked_of("h", "missing"),
    ]
    lines = read_lines(write(tmp_path, *same, *other))
    assert len({line.fingerprint for line in lines[:3]}) == 1
    assert len({line.fingerprint for line in lines}) == 1 + len(other)
    again = read_lines(write(tmp_path, "", *reversed([*same, *other])))
    assert {line.id: line.fingerprint for line in again} == {line.id: line.fingerprint for line in lines}


def test_changed_document_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("Text.")
    path = write(tmp_path, question(1), asked_of(2, "one.txt"), asked_of(3, "missing"))
    inline, in_file, missing = read_lines(path)

    def complaint(line: Line) -> str:
        with pytest.raises(ValueError) as caught:
            read_document(path, line)
        return str(caught.value)

    assert "questions.jsonl, line 3: document_file" in complaint(missing) and "does not exist" in complaint(missing)
    for content in (b"Text", b"\xfcText."):
        file.write_bytes(content)
        assert complaint(in_file) == f"{file}: the document has changed since the job began; run it again."
    file.unlink()
    assert complaint(in_file) == f"{file}: the document can no longer be read: No such file or directory."
    for line in (question(1, "Text!"), asked_of(1, "one.txt"), "no JSON", ""):
        write(tmp_path, line)
        assert complaint(inline) == f"{path}, line 1: the document has changed since the job began; run it again."
    path.unlink()
    assert "line 1: the document can no longer be read" in complaint(inline)


@pytest.mark.parametrize(
    ("documents", "groups"),
    [  # one letter a document; "-" cannot be read, "!" after a letter: the query is the problem
        ("A A B B A", "AA BB A"),
        ("A A! A", "AA!A"),
        ("A! A B! B", "A!A B!B"),
        ("A B! B", "A B!B"),
        ("A B! A", "AA B!"),
        ("A - A", "AA -"),
        ("- - A", "- - A"),
        ("A - B! - A C! C", "AA - B! - C!C"),
        ("A! A!", "A! A!"),
        ("A - A! - A", "AA!A - -"),
        ("", ""),
    ],
)
def test_group_lines(tmp_path: Path, documents: str, groups: str) -> None:
    marks = documents.split()
    lines = []
    if marks:
        path = write(
            tmp_path,
            *(
                asked_of(index, "none") if mark == "-" else question(index, mark[0], "" if "!" in mark else "Why?")
                for index, mark in enumerate(marks)
            ),
        )
        lines = read_lines(path)
    found = group_lines(lines)
    assert " ".join("".join(marks[int(line.id)] for line in group) for group in found) == groups
    assert sorted(line.number for group in found for line in group) == [line.number for line in lines]
    assert all([line.number for line in group] == sorted(line.number for line in group) for group in found)
