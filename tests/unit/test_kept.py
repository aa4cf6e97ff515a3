"""Texts in the user's cache: written whole, private, and read only if unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apb_ds.loading import kept
from apb_ds.loading.kept import make_directory, read_sealed, write_sealed


def test_texts_are_read_as_written(tmp_path: Path) -> None:
    for text in ("", "one", "one\ntwo\n", "\u00c4pfel \U0001f600"):
        write_sealed(tmp_path / "a" / "b.json", text)
        assert read_sealed(tmp_path / "a" / "b.json") == text
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.json"]


def test_changed_texts_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    assert read_sealed(file) is None
    write_sealed(file, "some text")
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert read_sealed(file) is None
    for changed in (b"", b"\xff\xfe", content[:-1], content + b"x", content.split(b"\n")[1]):
        file.write_bytes(changed)
        assert read_sealed(file) is None
    file.write_bytes(content)
    assert read_sealed(file) == "some text"


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b.json"
    write_sealed(file, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_sealed(file, "new")
    assert read_sealed(file) == "old" and [item.name for item in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize(("umask", "expected"), [(0o000, 0o755), (0o002, 0o755), (0o022, 0o755), (0o077, 0o700)])
def test_modes(tmp_path: Path, umask: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        make_directory(tmp_path / "a" / "b")
        write_sealed(tmp_path / "a" / "c.json", "x")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [expected] * 2
    assert (tmp_path / "a" / "c.json").stat().st_mode & 0o777 == 0o600
