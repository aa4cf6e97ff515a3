"""Find out whether a model's files are damaged, after loading has failed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

from apb_ds.utils.text import first_line, kind_and_line, list_some

LFS_POINTER = b"version https://git-lfs"


def find_damage(files: Iterable[Path]) -> str | None:
    """Return which of these files cannot be read and why, None if all can. Missing files do not count.

    The suffix decides: safetensors, torch.save's output (.bin), or JSON, which must hold a mapping.
    """
    found = [f"{path.name}: {why}" for path in files if path.is_file() and (why := _damage(path)) is not None]
    return list_some(found, "; ") or None


def lfs_damage(path: Path) -> str | None:
    """Return what is wrong with a file that Git LFS has not fetched, None for any other file."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            return "it is a Git LFS pointer; run git lfs pull"
    return None


def _damage(path: Path) -> str | None:
    try:
        pointer = lfs_damage(path)
        if pointer is not None:
            return pointer
        if path.suffix == ".safetensors":
            return _safetensors_damage(path)
        if path.suffix == ".bin":
            return _pickle_damage(path)
        if path.suffix == ".json":
            return _json_damage(path)
    except (ValueError, OSError, RecursionError) as error:
        return kind_and_line(error)
    return None


def _json_damage(path: Path) -> str | None:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        return f"it holds {json.dumps(values)[:20]!r}, not a mapping"
    if path.name != "tokenizer.json":
        return None
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # it raises plain Exception
        return first_line(error)
    return None


def _safetensors_damage(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return first_line(error)


def _pickle_damage(path: Path) -> str | None:
    """Return what is wrong with a file that torch.save wrote; its tensors are not read."""
    import torch

    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as stream:
        if not is_zip and stream.read(1) != pickle.PROTO:
            return "neither a zip archive nor a pickle"
    try:
        values = torch.load(path, map_location="meta", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            return "it holds Python objects other than tensors, which are not loaded"
        return kind_and_line(error)
    except Exception as error:  # of many kinds: the reader trusts the file
        return kind_and_line(error)
    return None if isinstance(values, dict) else f"it holds a {type(values).__name__}, not a mapping of tensors"
