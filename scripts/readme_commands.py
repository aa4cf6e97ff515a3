"""Run the commands that README.md and the pages in docs/ show.

A fenced block marked ``bash`` or ``python`` whose opening fence follows a line ``<!-- run -->`` is run from the
repository's root, in the virtual environment of the interpreter that runs this script. A block fails at the first
command that fails, or after ``--timeout`` seconds; the script runs all blocks and exits with 1 if any failed, or if
there was none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKER = "<!-- run -->"
FENCE = "```"
INTERPRETERS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


@dataclass(frozen=True)
class Block:
    """A fenced block to run; `line` is the number of its opening fence in the file, from 1."""

    line: int
    language: str
    text: str


def read_blocks(text: str) -> list[Block]:
    """Return the marked blocks of a Markdown text.

    Raises
    ------
    ValueError
        If a marker is not followed by a fence of a known language, or a fence is never closed.
    """
    lines = text.splitlines()
    blocks = []
    for index, line in enumerate(lines):
        if line.strip() != MARKER:
            continue
        fence = lines[index + 1].strip() if index + 1 < len(lines) else ""
        language = fence.removeprefix(FENCE)
        if not fence.startswith(FENCE) or language not in INTERPRETERS:
            allowed = " or ".join(FENCE + name for name in INTERPRETERS)
            raise ValueError(f"line {index + 2}: {fence!r} follows {MARKER}; it must be {allowed}.")
        body = lines[index + 2 :]
        closed = next((offset for offset, row in enumerate(body) if row.strip() == FENCE), None)
        if closed is None:
            raise ValueError(f"line {index + 2}: the block is never closed; end it with {FENCE}.")
        blocks.append(Block(index + 2, language, "\n".join(body[:closed])))
    return blocks


def run_block(block: Block, timeout_s: float) -> int:
    """Run one block and return its exit status, 124 if it took longer than `timeout_s`; it leaves no process behind."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    process = subprocess.Popen(
        [*INTERPRETERS[block.language], block.text],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):  # what the block left running in its session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pages() -> list[Path]:
    """Return README.md and the pages in docs/, in the order in which their blocks run."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    """Run the blocks of all files; return 1 if any failed or there was none, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files (default: README.md and docs/*.md)")
    parser.add_argument("--list", action="store_true", help="print the blocks instead of running them")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each block (default: %(default)s)")
    arguments = parser.parse_args()
    files = arguments.files or pages()
    blocks = [(file.name, block) for file in files for block in _read_file(file)]
    failed = []
    for name, block in blocks:
        where = f"{name}:{block.line}"
        print(f"--- {where}\n{block.text}", flush=True)
        if arguments.list:
            continue
        started = time.monotonic()
        status = run_block(block, arguments.timeout)
        print(f"--- {where}: exit {status} after {time.monotonic() - started:.1f} s", flush=True)
        if status:
            failed.append(where)
    verb = "listed" if arguments.list else "ran"
    outcome = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{verb} {len(blocks)} blocks of {len(files)} files{outcome}")
    return 1 if failed or not blocks else 0


def _read_file(file: Path) -> list[Block]:
    try:
        return read_blocks(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name}, {error}") from error


if __name__ == "__main__":
    sys.exit(main())
