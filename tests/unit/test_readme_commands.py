"""The script that runs the commands of README and docs: what it finds and runs, and that it fails with a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "readme_commands.py"


NUM_COMMANDS = 9  # that run in CI: each takes up to a minute, so one that is added replaces another


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def write(directory: Path, name: str, text: str) -> Path:
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return file


def run(tmp_path: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script(write(tmp_path, "page.md", text), *arguments)


def test_runs_marked_blocks_only(tmp_path: Path) -> None:
    unmarked = "```bash\nexit 3\n```\n"
    marked = "<!-- run -->\n```bash\nexpr 20 + 22\n```\n", "<!-- run -->\n```python\nprint(6 * 111)\n```\n"
    done = run(tmp_path, unmarked.join(marked))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n42\n" in done.stdout
    assert "\n666\n" in done.stdout
    assert "ran 2 blocks" in done.stdout


@pytest.mark.parametrize("body", ["false\ntrue", "false | cat", "echo $unset_name"])
def test_failing_command_fails_the_script_after_the_rest_ran(tmp_path: Path, body: str) -> None:
    done = run(tmp_path, f"<!-- run -->\n```bash\n{body}\n```\n<!-- run -->\n```bash\nexpr 20 + 22\n```\n")
    assert done.returncode == 1
    assert "\n42\n" in done.stdout
    assert "failed: page.md:2" in done.stdout


def test_slow_command_is_stopped(tmp_path: Path) -> None:
    done = run(tmp_path, "<!-- run -->\n```bash\nsleep 50\n```\n", "--timeout", "0.2")
    assert done.returncode == 1
    assert "exit 124" in done.stdout


@pytest.mark.parametrize("text", ["<!-- run -->\nwords\n", "<!-- run -->\n```bash\ntrue\n", "no block at all\n"])
def test_malformed_page_fails(tmp_path: Path, text: str) -> None:
    assert run(tmp_path, text).returncode == 1


def test_runs_the_blocks_of_several_files_and_names_the_one_that_failed(tmp_path: Path) -> None:
    first = write(tmp_path, "first.md", "<!-- run -->\n```bash\nfalse\n```\n")
    second = write(tmp_path, "second.md", "no block at all\n")
    third = write(tmp_path, "third.md", "\n<!-- run -->\n```bash\nexpr 20 + 22\n```\n")
    done = run_script(first, second, third)
    assert done.returncode == 1
    assert "\n42\n" in done.stdout
    assert "ran 2 blocks of 3 files; failed: first.md:2\n" in done.stdout


def test_malformed_block_is_named_with_its_file(tmp_path: Path) -> None:
    done = run(tmp_path, "\n<!-- run -->\nwords\n")
    assert "page.md, line 3" in done.stderr


def test_readme_and_docs_have_commands_to_run() -> None:
    done = run_script("--list")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "README.md:" in done.stdout and "make demo" in done.stdout
    assert "command_line.md:" in done.stdout and "task=batch" in done.stdout
    assert f"listed {NUM_COMMANDS} blocks" in done.stdout
