"""The checkout stays small enough to copy to machines without a network."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 20_000_000


def run_git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def tracked_sizes(directory: Path) -> dict[str, int]:
    """Return the size of each tracked file; a file that was deleted and is still in the index has none."""
    files = run_git(directory, "ls-files", "-z").split("\0")[:-1]
    return {name: (directory / name).lstat().st_size for name in files if (directory / name).is_file()}


def test_the_tracked_tree_is_light() -> None:
    try:
        top = Path(run_git(ROOT, "rev-parse", "--show-toplevel").strip())
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout, or git cannot read it: {error}")
    if top.resolve() != ROOT:
        pytest.skip(f"these files are not a git checkout; the one around them is {top}")
    sizes = tracked_sizes(ROOT)
    heaviest = sorted(sizes.items(), key=lambda entry: -entry[1])[:5]
    assert len(sizes) > 300
    assert sum(sizes.values()) <= LIMIT_BYTES, f"{sum(sizes.values()):,} bytes are tracked; the largest: {heaviest}"


def test_only_tracked_files_count(tmp_path: Path) -> None:
    run_git(tmp_path, "init", "--quiet")
    for name, size in {"tracked": 3, "deleted": 7, "untracked": 11}.items():
        (tmp_path / name).write_bytes(bytes(size))
    run_git(tmp_path, "add", "tracked", "deleted")
    (tmp_path / "deleted").unlink()
    assert tracked_sizes(tmp_path) == {"tracked": 3}
