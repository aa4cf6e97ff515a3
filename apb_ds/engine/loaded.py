"""Read a saved context, on any number of ranks.

Keys carry their rotation and a shard's tokens need no order, so another number of ranks deals all tokens evenly; as
many ranks as before take what they had. A rank reads the chunks that it needs tokens of, and checks these.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb_ds.attention import APBAttention
from apb_ds.cache import ShardedCache, host_like, shape_alone
from apb_ds.engine.saved import FORMAT, MANIFEST, VERSION, as_path
from apb_ds.engine.saved_facts import check_same, content_facts, describe_layers
from apb_ds.engine.saved_files import (
    Chunk,
    Staging,
    bytes_of,
    crc,
    cut_into_chunks,
    file_name,
    in_threads,
    read_all,
    synchronize,
)
from apb_ds.plan import Plan, split_evenly
from apb_ds.utils.sizes import LayerAttention


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
        check_same("model", self.model, facts)
        here = describe_layers(layers)
        if self.layers != here:
            raise ValueError("the context was saved with another model: what its layers store differs.")

    def check_settings(self, attention: APBAttention, plan: Plan) -> None:
        """Raise ValueError unless the settings would make the same content."""
        check_same("method's settings", self.settings, content_facts(attention, plan))

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
        on_host : whether it is to lie in host memory, without spare room

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
                keys, values = (host_like(part) for part in states)
            else:
                layer.reserve(num_tokens)
                keys, values = layer.made_buffers(states[0], states[1])
            layer.hold(keys, values, num_tokens)
            targets[layer_idx] = layer.shard()
        cache.set_length(self.cached_tokens)
        synchronize(device)
        with contextlib.ExitStack() as stack:
            reads = list(self._reads(span, targets, stack))
            where = torch.device("cpu") if on_host else device
            staging = Staging(where, max((read.chunk.num_bytes for read in reads), default=0))
            in_threads(partial(_Read.run, staging=staging), reads)

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

    def run(self, staging: Staging) -> None:
        chunk = self.chunk
        staged = staging.part(chunk.shape, chunk.dtype)
        data = bytes_of(staged)
        if not read_all(self.descriptor, data, self.file.header_bytes + chunk.start):
            raise ValueError(f"{self.file.path} is truncated.")
        if crc(data) != self.expected:
            raise ValueError(f"{self.file.path} was changed or is damaged: the checksum of {chunk.name} is another.")
        staging.copy(self.target, staged[:, self.first : self.first + self.target.shape[1]])


def read_manifest(path: str | os.PathLike[str]) -> SavedContext:
    """Read a saved context's manifest, and check that its files are there, as long as they were, and begin alike.

    Raises
    ------
    ValueError
        If it is not a saved context, is incomplete, or was changed.
    """
    directory = as_path(path)
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
        is_whole = head["checksum"] == crc(memoryview(contents_text.encode()))
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
        chunks = cut_into_chunks(layers, entry["dtypes"], entry["tokens"], in_windows, contents["chunk_tokens"])
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
    if crc(memoryview(header)) != file.header_checksum:
        raise ValueError(f"{file.path} was changed or is damaged: the checksum of its header is another.")
