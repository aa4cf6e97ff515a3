"""Texts that a user gives: literal, from a file, from standard input."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from apb_ds.tasks.answering import AnsweringConfig
from apb_ds.tasks.lines import read_lines
from apb_ds.tasks.text import check_text, check_text_source, expand_path, is_file, read_text

FIELD = "task.document"


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        (" with blanks\n", " with blanks\n"),
        ("user@example.org", "user@example.org"),
        ("@@user says", "@user says"),
        ("@@@", "@@"),
        ("@@", "@"),
        ("-1", "-1"),
        ("--", "--"),
        ("\ufeffmark", "mark"),
        ("ma\ufeffrk", "ma\ufeffrk"),
        (" s.txt", " s.txt"),
        ("What is s.txt?", "What is s.txt?"),
        ("and/or", "and/or"),
        ("1.10", "1.10"),
    ],
)
def test_text_as_it_stands(value: str, text: str) -> None:
    check_text_source(FIELD, value)
    assert not is_file(value)
    assert read_text(FIELD, value) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"plain", "plain"),
        ("Äpfel\r\nund 梨\n".encode(), "Äpfel\r\nund 梨\n"),
        (b"\xef\xbb\xbfmarked", "marked"),
        (b"@@stays", "@@stays"),
        (b"-", "-"),
    ],
)
def test_file_and_standard_input(content: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("@text.txt", f"@{tmp_path}/text.txt", "@~/text.txt", "@./text.txt"):
        check_text_source(FIELD, value)
        assert read_text(FIELD, value) == text
    feed(monkeypatch, content)
    check_text_source(FIELD, "-")  # reads nothing
    assert read_text(FIELD, "-") == text


@pytest.mark.parametrize(("content", "position"), [(b"\xff", 0), (b"caf\xe9 au lait", 3), (b"abc\xe2\x82", 3)])
def test_not_utf8(content: bytes, position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"task.document='@.*latin.txt is not UTF-8 text \(at byte {position}\)"):
        read_text(FIELD, f"@{path}")
    feed(monkeypatch, content)
    with pytest.raises(ValueError, match=rf"task.document=-: standard input is not UTF-8 text \(at byte {position}\)"):
        read_text(FIELD, "-")


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_nothing_in_it(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"task.document='@.*empty.txt' is (empty|only white space)"):
        read_text(FIELD, f"@{path}")
    feed(monkeypatch, content)
    with pytest.raises(ValueError, match=r"task.document='-' is (empty|only white space)"):
        read_text(FIELD, "-")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ab\0", "NUL character at character 2"),
        ("\ufeff\0", "NUL character at character 0"),
        ("ab\ud83d", r"half a surrogate pair \(\\ud83d\) at character 2"),
        ("caf\udce9", "not UTF-8: byte 0xe9 at character 3"),
    ],
)
def test_what_is_no_text(text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes from: a setting, a file, standard input, a stop string, a line of a batch."""
    with pytest.raises(ValueError, match=problem):
        check_text(FIELD, text)
    with pytest.raises(ValueError, match=rf"task.stop=.*{problem}"):
        AnsweringConfig(stop=["\n", text])
    line = json.dumps({"id": 1, "document": text, "query": text})
    (tmp_path / "q.jsonl").write_text(line)
    assert len(re.findall(problem, read_lines(tmp_path / "q.jsonl")[0].problem or "")) == 2
    if "\0" in text:
        feed(monkeypatch, text.encode())
        with pytest.raises(ValueError, match=f"task.document='-' has a {problem}"):
            read_text(FIELD, "-")


def test_utf16_without_a_mark(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"NUL character at character 1.*UTF-16"):
        read_text(FIELD, f"@{tmp_path}/wide.txt")


def test_a_mark_is_part_of_no_text(tmp_path: Path) -> None:
    assert check_text(FIELD, "\ufefftext") == "text"
    assert AnsweringConfig(stop="\ufeffEnd").stop == ["End"]
    for stop in ("\ufeff", ["x", "\ufeff"]):
        with pytest.raises(ValueError, match=r"task.stop=.* none of them empty"):
            AnsweringConfig(stop=stop)


@pytest.mark.parametrize("value", ["s.txt", "notes.MD", "./log", "~/log", "/var/log/x", "here"])
def test_a_forgotten_mark(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        check_text_source(FIELD, value)
    for part in (f"task.document='{value}'", f"task.document=@{value}", f'task.document=" {value}"'):
        assert part in str(caught.value)


def test_an_address_is_not_fetched() -> None:
    with pytest.raises(ValueError, match=r"task.document='https://a.org/b.html' is an address.*@FILE.*put a space"):
        check_text_source(FIELD, "https://a.org/b.html")
    check_text_source(FIELD, "what is https://a.org/b.html?")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", r"there is no file .*missing.txt. \(A text that begins with @ is written with @@.\)"),
        ("", "is a directory; name a text file"),
        ("file.txt/below", "there is no file"),
        ("no\0name", "there is no file"),
        ("long " * 2000, r"cannot read .*File name too long.*begins with @ is written with @@"),
    ],
)
def test_no_such_file(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    value = f"@{tmp_path}/{name}"
    for refuse in (check_text_source, read_text):
        with pytest.raises(ValueError, match=rf"(?s)task.document='@.*{message}") as caught:
            refuse(FIELD, value)
        assert len(str(caught.value)) < 1000


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.txt").write_text("text")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*file.txt \(Permission denied\)"):
        read_text(FIELD, f"@{tmp_path}/file.txt")
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*file.txt' \(Permission denied\)"):
        check_text_source(FIELD, f"@{tmp_path}/file.txt")


def test_standard_input_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Directory(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: object) -> int:
            raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Directory())))
    with pytest.raises(ValueError, match=r"task.document=-: cannot read standard input \(Is a directory\)"):
        read_text(FIELD, "-")


def test_home_of_nobody() -> None:
    with pytest.raises(ValueError, match=r"task.document='~nobody-at-all/x'.*no home directory.*write the path out"):
        expand_path(FIELD, "~nobody-at-all/x")
    with pytest.raises(ValueError, match="no home directory"):
        check_text_source(FIELD, "@~nobody-at-all/x")


@pytest.mark.parametrize(("value", "shown"), [(7, "7"), (0, "0"), (1.10, "1.1"), (True, "true"), (False, "false")])
def test_what_yaml_makes_of_a_text(value: object, shown: str) -> None:
    with pytest.raises(ValueError, match=rf'task.document={shown} is .*, not a text; quote it .*: document: "'):
        check_text(FIELD, value)
    with pytest.raises(ValueError, match=rf'task.stop={shown} is .*, not a text; quote it .*: stop: "'):
        AnsweringConfig(stop=["a", value])  # type: ignore[list-item]


@pytest.mark.parametrize("value", ["", " \n", None])
def test_no_text_given(value: object) -> None:
    with pytest.raises(ValueError, match=r"task.document=.* is empty; give a text, @FILE .* or - for standard input"):
        check_text(FIELD, value)


@pytest.mark.parametrize("value", [["a", "b"], [], {"a": 1}])
def test_list_or_mapping_is_not_a_text(value: object) -> None:
    with pytest.raises(ValueError, match=r"task.document=.* is not a text; it must be quoted"):
        check_text(FIELD, value)
