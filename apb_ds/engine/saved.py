"""Contexts on disk: a directory with a manifest and a safetensors file for each rank that saved.

A rank writes its shard alone into one file, and any rank reads from any file what it needs. Keys and values are cut
along the tokens, in chunks of `CHUNK_TOKENS`, each a tensor with a checksum. Keys carry their rotation and a shard's
tokens need no order, so another number of ranks deals all tokens evenly; as many ranks as before take what they had.
Layers with windows are the same on every rank; the first rank writes them.

Threads copy, sum and write (or read) a chunk each, so that no more than these are in memory twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apb_ds.attention import APBAttention
from apb_ds.cache import ShardedCache, host_like, shape_alone
from apb_ds.engine.calls import exclusive_call
from apb_ds.parallel.consistency import checksum, describe_model, shared_outcome, shared_validation
from apb_ds.parallel.launcher import ranks_on_node
from apb_ds.plan import Plan, split_evenly
from apb_ds.utils.sizes import LayerAttention
from apb_ds.utils.versions import versions

if TYPE_CHECKING:
    from apb_ds.engine.context import Context

FORMAT = "apb_ds context"
VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
CHUNK_TOKENS = 2048
MAX_THREADS = 16
SHOWN_DIFFERENCES = 3
SHOWN_CHARACTERS = 80
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8,
    "U8": torch.uint8, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Fields of a model's config that do not change what it computes, or that its other facts cover.
OTHER_FIELDS = frozenset({
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "use_cache",
    "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "pruned_heads", "torchscript", "use_bfloat16", "attention_dropout", "initializer_range",
})  # fmt: skip


# --- what a context depends on ---------------------------------------------------------------------------------------


def model_facts(model: nn.Module) -> dict[str, str]:
    """Return what must be the same for keys and values to be a model's: class, config, weights, rotary frequencies."""
    described = describe_model(model)
    facts = {name: text for name, text in described.items() if name in ("class", "dtype")}
    facts |= {
        name: text
        for name, text in described.items()
        if name.startswith("config.") and name.removeprefix("config.") not in OTHER_FIELDS
    }
    facts["weights"] = _digest(f"{name}: {text}" for name, text in described.items() if name.startswith("weights "))
    stored = model.state_dict().keys()
    frequencies = [
        f"{name}: {checksum(buffer).tolist()}"
        for name, buffer in model.named_buffers()
        if name not in stored and "inv_freq" in name
    ]
    facts["rotary frequencies"] = _digest(frequencies)
    return facts


def content_facts(attention: APBAttention, plan: Plan) -> dict[str, Any]:
    """Return the settings that change what a document's cache contains; how it is computed does not."""
    if plan.exact:
        return {"exact": True}
    facts: dict[str, Any] = {
        "exact": False,
        "hosts": plan.hosts,
        "anchor_length": plan.anchor_length,
        "anchor's query tokens": plan.anchor_query_length,
        "passing_length": plan.passing_length,
    }
    if plan.anchor_query_length:
        facts["query_position"] = plan.query_position
    settings: Any = attention.config.settings
    if plan.passing_length:
        facts["compressor"] = settings.compressor
        heads = getattr(attention.compressor, "heads", None)
        if isinstance(heads, nn.Module):
            facts["retaining heads"] = _digest(f"{name}: {text}" for name, text in describe_model(heads).items())
        if settings.compressor == "random":
            facts["seed"] = settings.seed
    return facts


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _describe_layers(layers: Sequence[LayerAttention]) -> list[dict[str, Any] | None]:
    return [
        {"window": layer.window, "shapes": [list(shape) for shape in layer.stored_shapes]} if layer.stores else None
        for layer in layers
    ]


def _check_same(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs. Other versions of transformers have other config fields."""
    names = [name for name in {**saved, **here} if not name.startswith("config.") or (name in saved and name in here)]
    differing = [name for name in names if saved.get(name) != here.get(name)]
    if differing:
        shown = [
            f"{name} is {_shown(saved.get(name))} in the saved context and {_shown(here.get(name))} here"
            for name in differing[:SHOWN_DIFFERENCES]
        ]
        more = f"; and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
        raise ValueError(f"the context was saved with another {what}: {'; '.join(shown)}{more}.")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


# --- the format of a file --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A tensor of a file: (heads, tokens, channels), some tokens of one layer's keys or values.

    Attributes
    ----------
    first : of its tokens, among those of the file
    start : byte of the file's data at which it begins
    """

    name: str
    layer_idx: int
    is_values: bool
    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel() * self.dtype.itemsize)

    @property
    def stop(self) -> int:
        return self.start + self.num_bytes


def _chunks(
    layers: Sequence[dict[str, Any] | None],
    dtype_codes: Sequence[str | None],
    num_tokens: int,
    num_in_windows: Mapping[int, int],
    chunk_tokens: int,
) -> list[Chunk]:
    """Return what a file holds, in order.

    Parameters
    ----------
    layers : as `_describe_layers` gives them
    dtype_codes : of each layer
    num_tokens : of the shard, in layers without a window
    num_in_windows : by layer, of those with one; empty in all files but the first
    """
    found: list[Chunk] = []
    start = 0
    for layer_idx, layer in enumerate(layers):
        if layer is None:
            continue
        stored = num_tokens if layer["window"] is None else num_in_windows.get(layer_idx, 0)
        dtype = DTYPES[dtype_codes[layer_idx] or ""] if stored else torch.uint8
        for is_values, (heads, channels) in enumerate(layer["shapes"]):
            for number, first in enumerate(range(0, stored, chunk_tokens)):
                shape = heads, min(chunk_tokens, stored - first), channels
                name = f"layers.{layer_idx}.{'values' if is_values else 'keys'}.{number}"
                found.append(Chunk(name, layer_idx, bool(is_values), first, shape, dtype, start))
                start = found[-1].stop
    return found


def _header(chunks: Iterable[Chunk]) -> bytes:
    """Return the beginning of a safetensors file."""
    entries = {
        chunk.name: {
            "dtype": CODES[chunk.dtype],
            "shape": list(chunk.shape),
            "data_offsets": [chunk.start, chunk.stop],
        }
        for chunk in chunks
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_name(rank: int) -> str:
    return f"rank{rank}.safetensors"


# --- copies between a file and a device ------------------------------------------------------------------------------


class _Staging:
    """Host memory for one chunk in each thread, pinned for CUDA, and a stream to copy on."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = device
        self._num_bytes = max(1, num_bytes)
        self._local = threading.local()

    def part(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor in this thread's memory, which earlier ones share."""
        if not hasattr(self._local, "memory"):
            on_cuda = self._device.type == "cuda"
            self._local.memory = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=on_cuda)
            self._local.stream = torch.cuda.Stream(self._device) if on_cuda else None
        memory: Tensor = self._local.memory
        return memory[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(*shape)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy to or from a device, and wait for it. One of the two is this thread's `part`."""
        stream = self._local.stream
        if stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()


def _bytes_of(states: Tensor) -> memoryview:
    array: Any = states.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return what `work` gives for each item; after an error the items that have not begun are left out."""
    cores = len(os.sched_getaffinity(0)) // ranks_on_node()
    with ThreadPoolExecutor(max(2, min(MAX_THREADS, cores))) as executor:
        try:
            return list(executor.map(work, items))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- saving ----------------------------------------------------------------------------------------------------------


def save_context(context: Context, path: str | os.PathLike[str]) -> None:
    """Write a context; see `Context.save`."""
    group, device = context.group, context.engine.device
    with exclusive_call(context.model):
        with shared_validation(group, "save", device) as comparison:
            target = _checked_target(path)
            comparison.facts = {"path": str(target), "context": context.facts}
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
                written = _write_shard(context, unfinished / file_name(group.rank))
            files = group.gather_objects(written)
            with shared_outcome(group):
                if group.is_first:
                    _write_manifest(unfinished / MANIFEST, _manifest(context, files))
                    _replace(target, unfinished)
        except BaseException:
            if group.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _checked_target(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path to save to."""
    target = _as_path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: {target.parent} is not a directory; make it first.")
    if target.is_symlink() or (target.exists() and not _is_saved(target)):
        raise ValueError(f"path={str(path)!r} exists and is not a saved context; it is not replaced. Use another path.")
    return target


def _as_path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.path.abspath(os.fspath(path)))
    except TypeError as error:
        raise ValueError(f"path={path!r} must be a path.") from error


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
    chunks = _chunks(_describe_layers(layers), codes, num_tokens, in_windows, CHUNK_TOKENS)
    header = _header(chunks)
    devices = {keys.device for keys, _ in shards.values()} or {torch.device("cpu")}
    (device,) = devices
    staging = _Staging(device, max((chunk.num_bytes for chunk in chunks), default=0))
    _synchronize(device)
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:

        def write(chunk: Chunk) -> str:
            states = shards[chunk.layer_idx][chunk.is_values][0, :, chunk.first : chunk.first + chunk.shape[1]]
            staged = staging.part(chunk.shape, chunk.dtype)
            staging.copy(staged, states)
            data = _bytes_of(staged)
            _write_all(descriptor, data, len(header) + chunk.start)
            return _sum(data)

        _write_all(descriptor, memoryview(header), 0)
        checksums = _in_threads(write, chunks)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {
        "tokens": num_tokens,
        "in_windows": {str(layer_idx): length for layer_idx, length in in_windows.items()},
        "dtypes": codes,
        "bytes": len(header) + (chunks[-1].stop if chunks else 0),
        "header": _sum(memoryview(header)),
        "checksums": checksums,
    }


def _sum(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _manifest(context: Context, files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "software": versions(),
        "model": context.engine.model_facts(),
        "settings": content_facts(context.attention, context.plan),
        "layers": _describe_layers(context.cache.attention),
        "chunk_tokens": CHUNK_TOKENS,
        "max_positions": context.max_positions,
        "document_tokens": context.plan.num_tokens,
        "cached_tokens": context.num_cached,
        "token_ids": context.token_ids[0].tolist(),
        "files": list(files),
    }


def _write_manifest(file: Path, contents: dict[str, Any]) -> None:
    text = json.dumps(contents)
    head = {"format": FORMAT, "version": VERSION, "checksum": _sum(memoryview(text.encode()))}
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


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedFile:
    """A rank's file.

    Attributes
    ----------
    tokens : of the shard, in layers without a window
    in_windows : tokens of layers with a window, in the first rank's file
    chunks, checksums : in the file's order
    header_bytes, header_checksum : of what comes before its data
    """

    path: Path
    tokens: int
    in_windows: dict[int, int]
    chunks: list[Chunk]
    checksums: list[str]
    header_bytes: int
    header_checksum: str


@dataclass(frozen=True)
class SavedContext:
    """A manifest that was read, its files not yet.

    Attributes
    ----------
    token_ids : (1, tokens), int64, on CPU
    document_tokens : of them, those that were prefilled
    cached_tokens : of them, those in the cache
    settings : what the content depends on; see `content_facts`
    checksum : of the manifest
    """

    token_ids: Tensor
    document_tokens: int
    cached_tokens: int
    max_positions: int
    model: dict[str, Any]
    settings: dict[str, Any]
    layers: list[dict[str, Any] | None]
    files: list[SavedFile]
    checksum: str

    @property
    def anchor_query_length(self) -> int:
        return int(self.settings.get("anchor's query tokens", 0))

    def check_model(self, facts: Mapping[str, Any], layers: Sequence[LayerAttention]) -> None:
        """Raise ValueError unless it is the model's."""
        _check_same("model", self.model, facts)
        here = _describe_layers(layers)
        if self.layers != here:
            raise ValueError("the context was saved with another model: what its layers store differs.")

    def check_settings(self, attention: APBAttention, plan: Plan) -> None:
        """Raise ValueError unless the settings would make the same content."""
        _check_same("method's settings", self.settings, content_facts(attention, plan))

    def shard_span(self, rank: int, world_size: int) -> tuple[int, int]:
        """Return which tokens a rank stores, of all files' one after the other: as many ranks have what they had."""
        lengths = [file.tokens for file in self.files]
        if world_size == len(lengths):
            return sum(lengths[:rank]), sum(lengths[: rank + 1])
        return split_evenly(sum(lengths), world_size)[rank]

    def read_into(self, cache: ShardedCache, span: tuple[int, int], device: torch.device, *, on_host: bool) -> None:
        """Read a rank's shard into a new cache.

        Parameters
        ----------
        span : as of `shard_span`
        device : of the model
        on_host : whether it is to lie in host memory, pinned if the device is CUDA, without spare room

        Raises
        ------
        ValueError
            Naming the file and the tensor, if a file was truncated or changed.
        """
        targets: dict[int, tuple[Tensor, Tensor]] = {}
        for layer_idx, (heads_and_channels, dtype, num_tokens) in self._stored(span).items():
            layer = cache.layer(layer_idx)
            states = [shape_alone((1, heads, num_tokens, size), dtype, device) for heads, size in heads_and_channels]
            if on_host:
                keys, values = (host_like(part, is_pinned=device.type == "cuda") for part in states)
            else:
                layer.reserve(num_tokens)
                keys, values = layer.made_buffers(states[0], states[1])
            layer.hold(keys, values, num_tokens)
            targets[layer_idx] = layer.shard()
        cache.set_length(self.cached_tokens)
        _synchronize(device)
        with contextlib.ExitStack() as stack:
            reads = list(self._reads(span, targets, stack))
            where = torch.device("cpu") if on_host else device
            staging = _Staging(where, max((read.chunk.num_bytes for read in reads), default=0))
            _in_threads(partial(_Read.run, staging=staging), reads)

    def _stored(self, span: tuple[int, int]) -> dict[int, tuple[list[Sequence[int]], torch.dtype, int]]:
        """Return heads and channels of keys and values, dtype and number of tokens of each layer that stores any."""
        found: dict[int, tuple[list[Sequence[int]], torch.dtype, int]] = {}
        for file in self.files:
            for chunk in file.chunks:
                layer: Any = self.layers[chunk.layer_idx]
                num_tokens = file.in_windows.get(chunk.layer_idx, span[1] - span[0])
                if num_tokens > 0:
                    found[chunk.layer_idx] = layer["shapes"], chunk.dtype, num_tokens
        return found

    def _reads(
        self, span: tuple[int, int], targets: Mapping[int, tuple[Tensor, Tensor]], stack: contextlib.ExitStack
    ) -> Iterator[_Read]:
        """Yield the chunks of which this rank needs tokens, layer by layer."""
        offset = 0
        pending: list[_Read] = []
        for file in self.files:
            descriptor = os.open(file.path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            for chunk, expected in zip(file.chunks, file.checksums, strict=True):
                layer: Any = self.layers[chunk.layer_idx]
                first = chunk.first if layer["window"] is not None else offset + chunk.first - span[0]
                num_here = targets[chunk.layer_idx][0].shape[2] if chunk.layer_idx in targets else 0
                start, stop = max(0, first), min(num_here, first + chunk.shape[1])
                if start < stop:
                    target = targets[chunk.layer_idx][chunk.is_values][0, :, start:stop]
                    pending.append(_Read(file, descriptor, chunk, expected, start - first, target))
            offset += file.tokens
        pending.sort(key=lambda read: read.chunk.layer_idx)
        yield from pending


@dataclass(frozen=True)
class _Read:
    """A chunk to be read; `target`, (heads, some tokens, channels), gets those of its tokens from `first` on."""

    file: SavedFile
    descriptor: int
    chunk: Chunk
    expected: str
    first: int
    target: Tensor

    def run(self, staging: _Staging) -> None:
        chunk = self.chunk
        staged = staging.part(chunk.shape, chunk.dtype)
        data = _bytes_of(staged)
        _read_all(self.file, self.descriptor, data, self.file.header_bytes + chunk.start)
        if _sum(data) != self.expected:
            raise ValueError(f"{self.file.path} was changed or is damaged: the checksum of {chunk.name} is another.")
        staging.copy(self.target, staged[:, self.first : self.first + self.target.shape[1]])


def _read_all(file: SavedFile, descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            raise ValueError(f"{file.path} is truncated.")
        data, offset = data[count:], offset + count


def read_manifest(path: str | os.PathLike[str]) -> SavedContext:
    """Read a saved context's manifest, and check that its files are there, as long as they were, and begin alike.

    Raises
    ------
    ValueError
        If it is not a saved context, is incomplete, or was changed.
    """
    directory = _as_path(path)
    file = directory / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"path={str(path)!r} is not a saved context: it has no {MANIFEST}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error
    head_text, _, contents_text = text.partition("\n")
    contents_text = contents_text.removesuffix("\n")
    if FORMAT not in head_text:
        raise ValueError(f"path={str(path)!r} is not a saved context: its {MANIFEST} is another program's.")
    damaged = f"{file} was changed or is damaged; save the context again."
    try:
        head = json.loads(head_text)
        if head["version"] != VERSION:
            raise ValueError(
                f"{file} has version {head['version']} of the format; this apb_ds reads version {VERSION}."
            )
        is_whole = head["checksum"] == _sum(memoryview(contents_text.encode()))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(damaged) from error
    if not is_whole:
        raise ValueError(damaged)
    try:
        return _parsed(directory, json.loads(contents_text), head["checksum"])
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(damaged) from error


def _parsed(directory: Path, contents: dict[str, Any], manifest_checksum: str) -> SavedContext:
    layers = contents["layers"]
    files = []
    for rank, entry in enumerate(contents["files"]):
        in_windows = {int(layer_idx): length for layer_idx, length in entry["in_windows"].items()}
        chunks = _chunks(layers, entry["dtypes"], entry["tokens"], in_windows, contents["chunk_tokens"])
        data_bytes = chunks[-1].stop if chunks else 0
        file = SavedFile(
            directory / file_name(rank),
            entry["tokens"],
            in_windows,
            chunks,
            entry["checksums"],
            entry["bytes"] - data_bytes,
            entry["header"],
        )
        _check_file(file, entry["bytes"])
        files.append(file)
    return SavedContext(
        torch.tensor([contents["token_ids"]], dtype=torch.int64),
        contents["document_tokens"],
        contents["cached_tokens"],
        contents["max_positions"],
        contents["model"],
        contents["settings"],
        layers,
        files,
        manifest_checksum,
    )


def _check_file(file: SavedFile, num_bytes: int) -> None:
    try:
        with open(file.path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header = stream.read(file.header_bytes)
    except OSError as error:
        raise ValueError(f"{file.path} cannot be read: {error}.") from error
    if size != num_bytes:
        raise ValueError(f"{file.path} is truncated or was changed: it has {size} bytes, and had {num_bytes}.")
    if _sum(memoryview(header)) != file.header_checksum:
        raise ValueError(f"{file.path} was changed or is damaged: the checksum of its header is another.")
