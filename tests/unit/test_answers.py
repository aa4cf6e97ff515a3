"""The output of a batch: what is kept, what is refused, and no answer is ever lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apb_ds.report import answers
from apb_ds.report.answers import AnswerFile

LINES: list[tuple[str | int, str]] = [("a", "f1"), (2, "f2"), ("c", "f3"), ("d", "f4")]
SETTINGS: dict[str, Any] = {"method": {"name": "apb", "hosts": 8, "anchor_length": None}, "seed": 0, "stop": ["x"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ids(path: Path) -> list[str | int]:
    return [result["id"] for result in results(path)]


def answer(path: Path, *indices: int, lines: list[tuple[str | int, str]] = LINES, **more: Any) -> None:
    """Answer the lines at these indices in a run that does not finish."""
    with AnswerFile(path, lines, SETTINGS, **more) as file:
        for index in indices:
            file.append(index, {"answer": f"answer {index}"})


def contents(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}


def line_of(index: int) -> bytes:
    key, fingerprint = LINES[index]
    return json.dumps({"id": key, "answer": f"answer {index}", "fingerprint": fingerprint}).encode() + b"\n"


def test_writes_results(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "out.jsonl"
    with AnswerFile(path, LINES, SETTINGS) as file:
        assert (file.kept, file.changed) == ({}, [])
        file.append(0, {"answer": "Größe\n\u2028", "tokens": 3})
        assert json.loads(path.read_bytes().splitlines()[0])["tokens"] == 3  # there before the file is closed
        assert json.loads((path.parent / "out.jsonl.settings.json").read_text()) == SETTINGS
        file.append(1, {"error": "no document \udcff"})
        file.finish()
    first, second = (json.loads(line) for line in path.read_bytes().split(b"\n")[:-1])
    assert first == {"id": "a", "fingerprint": "f1", "answer": "Größe\n\u2028", "tokens": 3}
    assert second == {"id": 2, "fingerprint": "f2", "error": "no document \udcff"}
    assert "Größe".encode() in path.read_bytes()
    assert sorted(contents(path.parent)) == ["out.jsonl", "out.jsonl.settings.json"]  # neither lock nor scratch


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b'{"id": "c", "fingerprint": "f3", "answer": "an',
        '{"id": "c", "answer": "ü'.encode()[:-1],
        b"{",
        b"\0\0\0",
        b"\n \n",
        b"  ",
    ],
)
def test_resumes_after_a_kill(path: Path, tail: bytes) -> None:
    answer(path, 0, 1)
    path.write_bytes(path.read_bytes() + tail)
    with AnswerFile(path, LINES, SETTINGS) as file:
        assert {index: kept["answer"] for index, kept in file.kept.items()} == {0: "answer 0", 1: "answer 1"}
        file.append(2, {"answer": "answer 2"})
        file.append(3, {"answer": "answer 3"})
        file.finish()
    assert path.read_bytes() == b"".join(line_of(index) for index in range(4))


def test_keeps_a_last_line_without_its_newline(path: Path) -> None:
    answer(path, 0, 1)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    answer(path, 2)
    assert path.read_bytes() == b"".join(line_of(index) for index in range(3))


def test_killed_while_answering(path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.test_answers import *\n"
        "with AnswerFile(Path(sys.argv[1]), LINES, SETTINGS) as file:\n"
        "    file.append(0, {'answer': 'answer 0'}); file.append(1, {'answer': 'answer 1'})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    with AnswerFile(path, LINES, SETTINGS) as file:  # the lock went with the process
        assert sorted(file.kept) == [0, 1]


def test_an_error_is_retried_and_finish_restores_the_order(path: Path) -> None:
    with AnswerFile(path, LINES, SETTINGS) as file:
        file.append(0, {"answer": "answer 0"})
        file.append(1, {"error": "out of memory"})
        file.append(2, {"answer": "answer 2"})
    with AnswerFile(path, LINES, SETTINGS) as file:
        assert sorted(file.kept) == [0, 2]
        assert file.changed == []
        file.append(1, {"answer": "answer 1"})
        assert ids(path) == ["a", "c", 2]
        file.finish()
        assert ids(path) == ["a", 2, "c"]
        file.append(3, {"answer": "answer 3"})  # still the same file
    assert path.read_bytes() == b"".join(line_of(index) for index in range(4))


def test_finish_rewrites_only_if_results_are_out_of_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    plain = answers.replace_file
    monkeypatch.setattr(answers, "replace_file", lambda file: written.append(file.name) or plain(file))
    with AnswerFile(path, LINES, SETTINGS) as file:
        for index in (0, 2, 3):
            file.append(index, {"answer": "x"})
        file.finish()
        assert written == []
        file.append(1, {"answer": "x"})
        file.finish()
        file.finish()
    assert written == ["out.jsonl"]
    assert ids(path) == ["a", 2, "c", "d"]


def test_input_in_another_order(path: Path) -> None:
    answer(path, 0, 1, 2)
    with AnswerFile(path, [("new", "f9"), *reversed(LINES)], SETTINGS) as file:
        assert {index: kept["id"] for index, kept in file.kept.items()} == {2: "c", 3: 2, 4: "a"}
        file.append(0, {"answer": "x"})
        file.finish()
    assert ids(path) == ["new", "c", 2, "a"]


def test_changed_line_is_answered_again(path: Path) -> None:
    answer(path, 0, 1, 2)
    before = path.read_bytes()
    lines = [LINES[0], (2, "other"), *LINES[2:]]
    with AnswerFile(path, lines, SETTINGS) as file:
        assert sorted(file.kept) == [0, 2]
        assert file.changed == [2]
    assert path.read_bytes() == before  # until there is something new
    with AnswerFile(path, lines, SETTINGS) as file:
        file.append(1, {"answer": "new"})
        assert ids(path) == ["a", "c", 2]  # the old answer is removed before the new one is written
        file.finish()
    assert [(result["id"], result["answer"]) for result in results(path)] == [
        ("a", "answer 0"),
        (2, "new"),
        ("c", "answer 2"),
    ]


@pytest.mark.parametrize("number_of_ids", [1, 7])
def test_answers_to_other_questions_are_refused(path: Path, number_of_ids: int) -> None:
    others: list[tuple[str | int, str]] = [(f"x{number}", "f") for number in range(number_of_ids)]
    answer(path, 0, *range(4, 4 + number_of_ids), lines=LINES + others)
    before = contents(path.parent)
    with pytest.raises(ValueError) as caught, AnswerFile(path, LINES, SETTINGS):
        pass
    shown = "'x0'" if number_of_ids == 1 else "'x0', 'x1', 'x2', 'x3', 'x4' and 2 more"
    assert f"has answers to ids that the input does not have: {shown}; give another task.output" in str(caught.value)
    assert "task.overwrite=true" in str(caught.value)
    assert contents(path.parent) == before


def test_an_error_of_a_foreign_question_is_dropped(path: Path) -> None:
    with AnswerFile(path, [*LINES, ("x", "f")], SETTINGS) as file:
        file.append(4, {"error": "no document"})
        file.append(0, {"answer": "answer 0"})
    with AnswerFile(path, LINES, SETTINGS) as file:
        assert sorted(file.kept) == [0]
        file.finish()
    assert path.read_bytes() == line_of(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line_of(0) + b'{"id": "c", "fing\n' + line_of(1), 'line 2 is not a result: \'{"id": "c", "fing'),
        (line_of(0) + b"{\n", "line 2 is not a result"),  # whole, so no kill left it
        (line_of(0) + b"My notes", "line 2 is not a result: 'My notes'"),
        (b"My notes", "line 1 is not a result: 'My notes'"),
        (b'{"lr": 0.1}', "line 1 is not a result"),  # another file, not a torn one
        (b'{"id": 1, "document": "d", "query": "q"}\n', "line 1 is not a result"),
        (b'{"id": "a", "answer": "x"}\n', "line 1 is not a result"),
        (b'{"id": true, "fingerprint": "f1", "answer": "x"}\n', "line 1 is not a result"),
        (b'{"id": "a", "fingerprint": "f1", "answer": "x", "error": "y"}\n', "line 1 is not a result"),
        (b'\xff\xfe{"id"\n', "line 1 is not a result"),
        (line_of(0) + line_of(1) + line_of(0), "lines 1 and 3 both have id 'a'"),
        (line_of(1) + line_of(1).replace(b'"id": 2', b'"id": "2"'), "lines 1 and 2 both have id '2'"),
    ],
)
def test_broken_output_is_refused_and_left_unchanged(path: Path, content: bytes, message: str) -> None:
    answer(path, 0)
    path.write_bytes(content)
    before = contents(path.parent)
    with pytest.raises(ValueError) as caught, AnswerFile(path, LINES, SETTINGS):
        pass
    assert message in str(caught.value)
    assert "give another task.output, or task.overwrite=true" in str(caught.value)
    assert contents(path.parent) == before


def changed(**values: Any) -> dict[str, Any]:
    return {**SETTINGS, **values}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (changed(seed=1), "other settings: seed was 0 and is 1. Use the old settings, give another task.output, or"),
        (changed(seed=False), "seed was 0 and is false."),
        (changed(stop=["x", "y"]), 'stop was ["x"] and is ["x", "y"].'),
        (changed(more={"deep": {"er": "ä"}}), 'more.deep.er was not set and is "ä".'),
        (changed(more={}), "more was not set and is {}."),
        (
            changed(method={"name": "star", "hosts": 4}),
            'method.name was "apb" and is "star"; method.hosts was 8 and is 4; method.anchor_length was null and is '
            "not set.",
        ),
        (changed(**{f"k{number}": number for number in range(7)}), "k4 was not set and is 4; and 2 more."),
        (changed(stop=["y" * 500]), '["' + "y" * 58 + "..."),
    ],
)
def test_other_settings_are_refused(path: Path, settings: dict[str, Any], message: str) -> None:
    answer(path, 0)
    before = contents(path.parent)
    with pytest.raises(ValueError) as caught, AnswerFile(path, LINES, settings):
        pass
    assert message in str(caught.value)
    assert "task.overwrite=true" in str(caught.value)
    assert contents(path.parent) == before


def test_equal_settings_in_another_notation_match(path: Path) -> None:
    answer(path, 0)
    same = changed(method=dict(reversed(SETTINGS["method"].items())) | {"hosts": 8.0}, stop=("x",))
    with AnswerFile(path, LINES, same) as file:
        assert sorted(file.kept) == [0]


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_answers_without_settings_are_refused(path: Path, content: str | None) -> None:
    answer(path, 0)
    settings = path.with_name("out.jsonl.settings.json")
    settings.unlink()
    if content is not None:
        settings.write_text(content)
    before = contents(path.parent)
    with pytest.raises(ValueError, match=r"out\.jsonl\.settings\.json.*task\.overwrite=true"):
        AnswerFile(path, LINES, SETTINGS).__enter__()
    assert contents(path.parent) == before


def test_settings_are_replaced_if_no_answer_is_kept(path: Path) -> None:
    with AnswerFile(path, LINES, SETTINGS) as file:
        file.append(0, {"error": "x"})
        file.append(1, {"answer": "x"})
    lines = [LINES[0], (2, "other"), *LINES[2:]]
    other = changed(seed=5)
    with AnswerFile(path, lines, other) as file:
        assert (file.kept, file.changed) == ({}, [2])
        file.append(2, {"answer": "x"})
    assert ids(path) == ["c"]
    assert json.loads(path.with_name("out.jsonl.settings.json").read_text()) == other


def test_overwrite_keeps_the_old_output(path: Path) -> None:
    answer(path, 0, 1)
    old = path.read_bytes()
    other = changed(seed=5)
    with AnswerFile(path, LINES, other, overwrite=True) as file:
        assert file.kept == {}
    with AnswerFile(path, LINES, other, overwrite=True) as file:  # an empty output does not replace the backup
        file.append(3, {"answer": "answer 3"})
    assert path.read_bytes() == line_of(3)
    backup = path.with_name("out.jsonl.bak")
    assert backup.read_bytes() == old
    with AnswerFile(backup, LINES, SETTINGS) as file:  # with its settings: it can be resumed
        assert sorted(file.kept) == [0, 1]


def test_overwrite_accepts_any_file(path: Path) -> None:
    path.write_text("My notes")
    answer(path, 0, overwrite=True)
    assert path.read_bytes() == line_of(0)
    assert path.with_name("out.jsonl.bak").read_text() == "My notes"
    assert not path.with_name("out.jsonl.bak.settings.json").exists()


def test_a_second_run_on_the_same_output_is_refused(path: Path) -> None:
    with AnswerFile(path, LINES, SETTINGS) as file:
        file.append(0, {"answer": "answer 0"})
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"is being written by another run \(out\.jsonl\.lock is locked\)"):
                AnswerFile(path, LINES, SETTINGS, overwrite=overwrite).__enter__()
        assert path.with_name("out.jsonl.lock").exists()  # the refused run has not removed it
        file.append(1, {"answer": "answer 1"})
    assert path.read_bytes() == line_of(0) + line_of(1)
    assert not path.with_name("out.jsonl.lock").exists()
    path.with_name("out.jsonl.lock").touch()  # left by a killed run: nobody holds it
    answer(path, 2)
    assert len(ids(path)) == 3


def test_an_error_in_the_block_releases_the_lock(path: Path) -> None:
    with contextlib.suppress(KeyError), AnswerFile(path, LINES, SETTINGS):
        raise KeyError
    answer(path, 0)


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path, "is a directory; give another"),
        (tmp_path / "pipe", "is not a regular file; give another"),
        (
            tmp_path / "file" / "out.jsonl",
            f"cannot be written ([Errno 17] File exists: '{tmp_path / 'file'}'); give another",
        ),
        (tmp_path / ("n" * 300), "cannot be written ([Errno 36] File name too long"),
    ]:
        with pytest.raises(ValueError) as caught:
            AnswerFile(path, LINES, SETTINGS, section="eval").__enter__()
        assert f"eval.output: {path} {message}" in str(caught.value) and "another eval.output" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"cannot be written \(.*Permission denied"):
        AnswerFile(tmp_path / "folder" / "out.jsonl", LINES, SETTINGS).__enter__()


def test_symlinks_are_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "out.jsonl"
    path.symlink_to(tmp_path / "data" / "out.jsonl")
    answer(path, 1, 0)
    with AnswerFile(path, LINES, SETTINGS) as file:
        file.finish()
    assert path.is_symlink()
    assert ids(tmp_path / "data" / "out.jsonl") == ["a", 2]


def test_files_have_the_usual_mode(path: Path) -> None:
    previous = os.umask(0o027)
    try:
        answer(path, 1, 0)
        assert path.stat().st_mode & 0o777 == 0o640
        with AnswerFile(path, LINES, SETTINGS) as file:
            file.finish()
    finally:
        os.umask(previous)
    assert ids(path) == ["a", 2]
    assert [item.stat().st_mode & 0o777 for item in path.parent.iterdir()] == [0o640, 0o640]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"tokens": 3}, "either an answer or an error"),
        ({"answer": "x", "error": "y"}, "either an answer or an error"),
        ({"answer": "x", "id": 3}, "no id or fingerprint"),
        ({"answer": "x", "seconds": float("nan")}, "not JSON compliant"),
    ],
)
def test_malformed_results_are_refused(path: Path, result: dict[str, Any], message: str) -> None:
    answer(path, 0)
    with AnswerFile(path, LINES, SETTINGS) as file:
        with pytest.raises(ValueError, match=message):
            file.append(1, result)
        for done in (0, 2):
            if done == 2:
                file.append(2, {"answer": "answer 2"})
            with pytest.raises(ValueError, match="has a result already"):
                file.append(done, {"answer": "again"})
    assert path.read_bytes() == line_of(0) + line_of(2)


def test_a_failed_rewrite_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(path, 2, 0)
    path.write_bytes(path.read_bytes() + b'{"id": "d", "ans')
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    with AnswerFile(path, LINES, SETTINGS) as file, monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="disk full"):
                file.append(1, {"answer": "answer 1"})
            with pytest.raises(OSError, match="disk full"):
                file.finish()
        assert path.read_bytes() == before
    assert sorted(contents(path.parent)) == ["out.jsonl", "out.jsonl.settings.json"]
    with AnswerFile(path, LINES, SETTINGS) as file:
        assert sorted(file.kept) == [0, 2]


def test_a_crash_between_rewrite_and_append_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AnswerFile(path, LINES, SETTINGS) as file:
        file.append(0, {"answer": "answer 0"})
        file.append(1, {"error": "x"})
        file.append(2, {"answer": "answer 2"})

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with AnswerFile(path, LINES, SETTINGS) as file:
        monkeypatch.setattr(file, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            file.append(1, {"answer": "answer 1"})
    assert path.read_bytes() == line_of(0) + line_of(2)
    with AnswerFile(path, LINES, SETTINGS) as file:
        assert sorted(file.kept) == [0, 2]
        file.append(1, {"answer": "answer 1"})
        file.finish()
    assert path.read_bytes() == line_of(0) + line_of(1) + line_of(2)


def test_a_failed_append_leaves_no_trace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AnswerFile(path, LINES, SETTINGS) as file:
        file.append(0, {"answer": "answer 0"})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                file.append(1, {"answer": "lost"})
        assert path.read_bytes() == line_of(0)
        file.append(1, {"answer": "answer 1"})
    assert path.read_bytes() == line_of(0) + line_of(1)
