"""Files in the user's cache: written whole or not at all, writable by the owner only, checked by hash at every load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

SEAL_NAME = "sha256.json"
OTHERS_WRITE = 0o022


def cache_root() -> Path:
    """Return the cache's directory: ``APB_DS_CACHE``, or ``apb_ds`` in the user's cache directory."""
    own = os.environ.get("APB_DS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "apb_ds"


def make_directory(path: Path) -> None:
    """Make a directory and its parents; new ones are writable by the owner only."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # another user made it just now
            folder.chmod(_mode(0o777))


def settle(directory: Path) -> None:
    """Replace the modes of temporary files by those of the user's umask, for a directory and its files.

    Only the owner may write, whatever the umask.
    """
    directory.chmod(_mode(0o777))
    for file in directory.iterdir():
        file.chmod(_mode(0o666))


def seal(directory: Path) -> None:
    """Write the SHA-256 of each of a directory's files next to them, for `broken_seal` to compare."""
    digests = {file.name: file_digest(file) for file in sorted(directory.iterdir())}
    (directory / SEAL_NAME).write_text(json.dumps(digests, indent=2), encoding="utf-8")


def broken_seal(directory: Path) -> str | None:
    """Return what is wrong with a sealed directory: a changed, missing or new file. None if nothing has changed."""
    try:
        digests = json.loads((directory / SEAL_NAME).read_text(encoding="utf-8"))
        found = {file.name for file in directory.iterdir()} - {SEAL_NAME}
        if not isinstance(digests, dict):
            return f"{SEAL_NAME} is not a mapping"
        for name in sorted(found ^ set(digests)):
            return f"{name} is {'new' if name in found else 'missing'}"
        return next(
            (f"{name} has changed" for name in sorted(found) if file_digest(directory / name) != digests[name]), None
        )
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{SEAL_NAME} or a file that it names cannot be read ({type(error).__name__})"


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sealed(file: Path, text: str) -> None:
    """Write a text after a line with its SHA-256, whole or not at all, readable by the owner only.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    make_directory(file.parent)
    descriptor, scratch = tempfile.mkstemp(prefix=f"{file.stem[:12]}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"{_text_digest(text)}\n{text}")
        os.replace(scratch, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def read_sealed(file: Path) -> str | None:
    """Return what `write_sealed` wrote; None if the file is missing or has changed."""
    try:
        digest, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return text if digest == _text_digest(text) else None


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _mode(asked: int) -> int:
    umask = os.umask(0)
    os.umask(umask)
    return asked & ~umask & ~OTHERS_WRITE
