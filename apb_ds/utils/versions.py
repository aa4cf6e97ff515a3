"""Which versions of what are at work here. No torch: distributions and files are asked, nothing is imported."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

from apb_ds import __version__

PACKAGES = ("torch", "transformers", "deepspeed", "hydra-core", "omegaconf")
DIGEST_LENGTH = 12


def versions() -> dict[str, str | None]:
    """Return the versions of Python, apb_ds and the libraries it stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "apb_ds": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def source_digest() -> str:
    """Return a hash of this package's own source files: a clone that was not updated has the same version.

    An installed package also contains configs and launch, which lie outside of it in a checkout: they are left out.
    """
    folder = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        if file.relative_to(folder).parts[0] in ("configs", "launch"):
            continue
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:DIGEST_LENGTH]
