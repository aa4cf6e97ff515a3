"""The next process removes what a killed one left: directories of ranks, unfinished files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from apb_ds.report.record import remove_scratch, replace_file

ROOT = Path(__file__).resolve().parents[2]


def test_directories_of_killed_ranks_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"apb_ds-{ended.pid}-old", f"apb_ds-{os.getpid()}-alive", "apb_ds-users", f"other-{ended.pid}-x"):
        (tmp_path / name / "0").mkdir(parents=True)
    code = "from launch import common; print(common._private_directory(common.ending.Watch()).name)"
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("apb_ds-")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f"apb_ds-{os.getpid()}-alive", "apb_ds-users", f"other-{ended.pid}-x"])


def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "answers[1].jsonl"
    with replace_file(path) as stream:
        stream.write("old\n")
        (begun,) = (found for found in tmp_path.iterdir() if found != path)
        others = [tmp_path / f".{path.name}.swp", tmp_path / ".answers1.jsonl.abcdefgh.part"]
        for other in others:
            other.write_text("somebody else's")
        remove_scratch(path)
        assert not begun.exists() and all(other.exists() for other in others)
        begun.write_text("new\n")
    assert path.read_text() == "new\n"
