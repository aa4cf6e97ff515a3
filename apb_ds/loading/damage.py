"""Finding the file of a model directory that is damaged, once loading has failed."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

from apb_ds.loading.wording import first_line

TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def find_damage(directory: Path) -> str | None:
    """Return which files of a model directory cannot be read and why, None if all can."""
    found = [f"{path.name}: {why}" for path in sorted(directory.iterdir()) if (why := _damage(path)) is not None]
    return "; ".join(found) or None


def _damage(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            return _safetensors_damage(path)
        if path.suffix == ".bin":
            return _pickle_damage(path)
        if path.name in TEXT_FILES or path.name.endswith(".index.json"):
            json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _safetensors_damage(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return first_line(error)


def _pickle_damage(path: Path) -> str | None:
    """Return what is wrong with a file of torch.save, as far as its container tells; tensors are not read."""
    if zipfile.is_zipfile(path):
        return None
    with path.open("rb") as stream:
        starts_a_pickle = stream.read(1) == pickle.PROTO
    return None if starts_a_pickle else "neither a zip archive nor a pickle"
