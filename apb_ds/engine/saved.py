"""Save a context: each rank writes its shard, and the first one a manifest, last.

A directory holds ``manifest.json`` and a safetensors file for each rank that saved: a rank writes its shard alone
into one file, and any rank reads from any file what it needs. Keys and values are cut along the tokens, in chunks of
`CHUNK_TOKENS`, each a tensor with a checksum. Layers with windows are the same on every rank; the first writes them.

Threads copy, sum and write a chunk each, so that no more than these are in memory twice. See `loaded` for reading.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apb_ds.engine.calls import exclusive_call
from apb_ds.engine.saved_facts import check_whole, content_facts, describe_layers
from apb_ds.engine.saved_files import (
    CODES,
    Chunk,
    Staging,
    beside,
    bytes_of,
    crc,
    cut_into_chunks,
    file_name,
    in_threads,
    make_header,
    synchronize,
    write_all,
)
from apb_ds.hf.adapters import check_adapters
from apb_ds.parallel.consistency import shared_outcome, shared_validation
from apb_ds.utils.versions import versions

if TYPE_CHECKING:
    from apb_ds.engine.context import Context

FORMAT = "apb_ds context"
VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
CHUNK_TOKENS = 2048


def save_context(
    context: Context, path: str | os.PathLike[str], while_waiting: Callable[[], object] | None = None
) -> None:
    """Write a context; see `Context.save`."""
    group, device = context.group, context.engine.device
    with exclusive_call(context.model):
        with shared_validation(group, "save", device) as comparison:
            check_whole(context.engine.stage)
            target = _checked_target(path)
            check_adapters(context.model, context.adapters)
            comparison.facts = {"path": str(target), "context": context.facts}
        facts = context.engine.model_facts()
        token = group.gather_objects(secrets.token_hex(4))[0]
        unfinished = target.with_name(f".{target.name}.{token}{PARTIAL}")
        try:
            with shared_outcome(group):
                if group.is_first:
                    unfinished.mkdir()
            with shared_outcome(group):
                if not unfinished.is_dir():
                    raise OSError(f"{target.parent} must be on a file system that all ranks share.")
                context.cache.forget_unreachable()
            file = unfinished / file_name(group.rank)
            written = beside(group, partial(_write_shard, context, file), while_waiting)
            files = group.gather_objects(written)
            with shared_outcome(group):
                if group.is_first:
                    _write_manifest(unfinished / MANIFEST, _manifest(context, facts, files))
                    _replace(target, unfinished)
        except BaseException:
            if group.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _checked_target(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path to save to."""
    target = as_path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: {target.parent} is not a directory; make it first.")
    if target.is_symlink() or (target.exists() and not _is_saved(target)):
        raise ValueError(f"path={str(path)!r} exists and is not a saved context; it is not replaced. Use another path.")
    return target


def _is_saved(path: Path) -> bool:
    """Whether there is a saved context, of any version, whole or damaged."""
    try:
        return FORMAT in (path / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _write_shard(context: Context, file: Path) -> dict[str, Any]:
    """Write this rank's file; return its entry in the manifest."""
    cache, layers = context.cache, context.cache.attention
    shards = cache.shards()
    lengths = {layer_idx: keys.shape[2] for layer_idx, (keys, _) in shards.items()}
    num_tokens = max((lengths[idx] for idx in lengths if layers[idx].window is None), default=0)
    in_windows = {idx: lengths[idx] for idx in lengths if layers[idx].window is not None and context.group.is_first}
    codes = [CODES[shards[idx][0].dtype] if idx in shards else None for idx in range(len(layers))]
    chunks = cut_into_chunks(describe_layers(layers), codes, num_tokens, in_windows, CHUNK_TOKENS)
    header = make_header(chunks)
    devices = {keys.device for keys, _ in shards.values()} or {torch.device("cpu")}
    (device,) = devices
    staging = Staging(device, max((chunk.num_bytes for chunk in chunks), default=0))
    synchronize(device)
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:

        def write(chunk: Chunk) -> str:
            states = shards[chunk.layer_idx][chunk.is_values][0, :, chunk.first : chunk.first + chunk.shape[1]]
            staged = staging.part(chunk.shape, chunk.dtype)
            staging.copy(staged, states)
            data = bytes_of(staged)
            write_all(descriptor, data, len(header) + chunk.start)
            return crc(data)

        write_all(descriptor, memoryview(header), 0)
        checksums = in_threads(write, chunks)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {
        "tokens": num_tokens,
        "in_windows": {str(layer_idx): length for layer_idx, length in in_windows.items()},
        "dtypes": codes,
        "bytes": len(header) + (chunks[-1].stop if chunks else 0),
        "header": crc(memoryview(header)),
        "checksums": checksums,
    }


def _manifest(context: Context, facts: dict[str, str], files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "software": versions(),
        "model": facts,
        "settings": content_facts(context.attention, context.plan),
        "layers": describe_layers(context.cache.attention),
        "chunk_tokens": CHUNK_TOKENS,
        "max_positions": context.max_positions,
        "document_tokens": context.plan.num_tokens,
        "cached_tokens": context.num_cached,
        "token_ids": context.token_ids[0].tolist(),
        "files": list(files),
    }


def _write_manifest(file: Path, contents: dict[str, Any]) -> None:
    text = json.dumps(contents)
    head = {"format": FORMAT, "version": VERSION, "checksum": crc(memoryview(text.encode()))}
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(f"{json.dumps(head)}\n{text}\n")
        stream.flush()
        os.fsync(stream.fileno())


def _replace(target: Path, unfinished: Path) -> None:
    """Put a complete directory in the place of what was saved there before."""
    _sync_directory(unfinished)
    before = unfinished.with_suffix(".before") if target.exists() else None
    if before is not None:
        os.rename(target, before)
    try:
        os.rename(unfinished, target)
    except BaseException:
        if before is not None:
            os.rename(before, target)
        raise
    _sync_directory(target.parent)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.path.abspath(os.fspath(path)))
    except TypeError as error:
        raise ValueError(f"path={path!r} must be a path.") from error
