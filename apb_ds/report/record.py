"""Records as JSON: writing a file whole, and the environment that numbers depend on."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from apb_ds.utils.versions import versions

RECORD_NAME = "record.json"
GIT_TIMEOUT_S = 10
SCRATCH_SUFFIX = ".part"
_REPOSITORY = Path(__file__).resolve().parents[2]


def environment(device: Any) -> dict[str, Any]:
    """Return what numbers depend on besides the config: versions, hardware and commit."""
    return {"versions": versions(), "hardware": hardware(device), "git": git_state()}


def hardware(device: Any) -> dict[str, Any]:
    """Return this rank's processor, the threads torch uses, and its GPU."""
    import torch

    found: dict[str, Any] = {
        "device": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def git_state(repository: Path = _REPOSITORY) -> dict[str, Any]:
    """Return the source tree's commit, and whether it has uncommitted changes.

    ``APB_DS_COMMIT`` gives the commit of a copy of the tree without a repository.
    """
    told = os.environ.get("APB_DS_COMMIT")
    top = _git(repository, "rev-parse", "--show-toplevel")
    # An installed package may lie inside another repository.
    if told or top is None or Path(top).resolve() != repository:
        return {"commit": told or None, "dirty": None}
    status = _git(repository, "status", "--porcelain")
    return {
        "commit": _git(repository, "rev-parse", "--verify", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` whole or not at all."""
    with replace_file(path) as stream:
        json.dump(content, stream, indent=2, default=_jsonable, allow_nan=False)
        stream.write("\n")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """Yield a stream whose text replaces the file at `path` at the end; after an error nothing has changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SCRATCH_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut may leave an empty file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, path)
        sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        raise


def sync_directory(path: Path) -> None:
    """Flush a directory's names to disk, if its file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_scratch(path: Path) -> None:
    """Remove what a killed process left of `replace_file` for `path`; no other process may be writing it."""
    for scratch in path.parent.glob(f".{glob.escape(path.name)}.*{SCRATCH_SUFFIX}"):
        scratch.unlink(missing_ok=True)


def rate(count: float, seconds: float) -> float | None:
    """Return count per second, None if either is 0."""
    return count / seconds if seconds > 0 and count > 0 else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, (Path, bytes)):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong in a record: {value!r}")


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
