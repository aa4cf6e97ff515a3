"""``--help``: each setting on one screen, its meaning too on two, without heavy imports."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.help import WIDTH, help_text, meanings_in

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
TASKS = sorted(file.stem for file in (ROOT / "configs" / "task").glob("*.yaml"))
MAX_LINES = 100
SCREEN_LINES = 45
HEAVY = ("torch", "deepspeed", "transformers", "fastapi", "pydantic", "uvicorn", "prometheus_client")


@pytest.mark.parametrize(
    ("script", "arguments"), [*((script, ()) for script in SCRIPTS), *(("infer", (f"task={task}",)) for task in TASKS)]
)
def test_it_fits_two_screens(script: str, arguments: tuple[str, ...]) -> None:
    lines = help_text(script, [*arguments, "all"]).splitlines()
    assert 40 < len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= WIDTH
    short = help_text(script, arguments)
    assert max(map(len, short.splitlines())) <= WIDTH and len(short.splitlines()) <= SCREEN_LINES
    names = [line.split()[0] for line in lines[lines.index("Settings") + 1 : lines.index("Flags")] if line[2:3].strip()]
    shown = re.findall(r"[\w.]+", short)
    assert names and all(name.partition(".")[2] in shown or name in shown for name in names)


def test_one_section() -> None:
    lines = help_text("infer", ["task=batch", "task"]).splitlines()
    assert lines[0].startswith("  task.input") and all(line.startswith(("  task.", "   ")) for line in lines)
    with pytest.raises(ValueError, match=r"--help='tsk'.*Did you mean 'task'"):
        help_text("infer", ["tsk"])


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} launch/infer.py --help | head -1; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in found.stderr and "BrokenPipe" not in found.stderr
    assert found.stdout.splitlines()[-1] in ("0", "141")


def test_values_and_meanings() -> None:
    rows = [
        " ".join(line.split()) for line in help_text("infer", ["task=batch", "method.hosts=16", "all"]).splitlines()
    ]
    assert "method.hosts 16 blocks of the document, a multiple of the number of" in rows
    assert any(row.startswith("method=apb apb, dense, ring") for row in rows)
    assert "task.input null the JSONL file" in rows
    assert "model.overrides {} fields of the model's config to replace" in rows
    assert not any(row.startswith(("task.num_tokens", "hydra.", "model.geometry.")) for row in rows)


def test_settings_of_a_derived_option_keep_their_meaning() -> None:
    assert "blocks of the document" in help_text("infer", ["method=star", "method"])


def test_a_folder_of_configs(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text("# @package _global_\nmethod:\n  hosts: 6\n")
    text = help_text("infer", ["--config-dir", str(tmp_path), "+exp=mine", "all"])
    assert " mine" in text and "method.hosts              6" in text


def test_comments(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(
        "# About the file.\nfirst: 1 # the first\nnested:\n  # Above\n  # it.\n  second: a#b # has a #\n"
        "  list: # several\n    - {kind: x} # not a setting\nlast: 2\n"
    )
    assert meanings_in(file) == {
        "first": "the first",
        "nested.second": "has a #",
        "nested.list": "several",
    }
    file.write_text("nested:\n  # Above\n  # it.\n  second: 2\n\nlast: 2\n")
    assert meanings_in(file) == {"nested.second": "Above it."}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_flag(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("launch.eval").main
    monkeypatch.setattr(sys, "argv", ["eval.py", "task=ruler", flag, "task"])
    assert main() == 0
    assert "task.data_dir" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["eval.py", "task=rular", flag])
    assert main() == 2
    assert "Did you mean 'ruler'?" in capsys.readouterr().err


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from launch.infer import main; main(); "
        f"sys.exit(str(set({HEAVY}) & set(sys.modules)) if set({HEAVY}) & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
