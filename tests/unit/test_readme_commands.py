"""The script that runs README's commands: what it finds, what it runs, and that it fails where a command does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "readme_commands.py"


def run(tmp_path: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "page.md"
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


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


def test_readme_has_commands_to_run() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "make demo" in done.stdout
