"""The safetensors files of a saved context, chunk by chunk, between disk and device, in threads."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from apb_ds.parallel.consistency import shared_outcome
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.launcher import ranks_on_node

MAX_THREADS = 16
WAIT_S = 0.01
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8,
    "U8": torch.uint8, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

Result = TypeVar("Result")

_beside = threading.local()  # of the thread that does something: whether that is unwanted by now


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


def cut_into_chunks(
    layers: Sequence[dict[str, Any] | None],
    dtype_codes: Sequence[str | None],
    num_tokens: int,
    num_in_windows: Mapping[int, int],
    chunk_tokens: int,
) -> list[Chunk]:
    """Return what a file holds, in order.

    Parameters
    ----------
    layers : as `describe_layers` gives them
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


def make_header(chunks: Iterable[Chunk]) -> bytes:
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


class Staging:
    """Host memory for one chunk in each thread, pinned for CUDA, and a stream to copy on."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = device
        self._num_bytes = max(1, num_bytes)
        self._local = threading.local()

    def part(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor in this thread's memory, which earlier ones share."""
        if not hasattr(self._local, "memory"):
            on_cuda = self._device.type == "cuda"
            if on_cuda:
                torch.cuda.set_device(self._device)  # of this thread; pinning would begin a context on the first one
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


def array_of(states: Tensor) -> Any:
    """Return the bytes of a contiguous tensor in host memory, as a NumPy array that shares them."""
    return states.reshape(-1).view(torch.uint8).numpy()


def bytes_of(states: Tensor) -> memoryview:
    return memoryview(array_of(states))


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return what `work` gives for each item; after an error the items that have not begun are left out.

    So are they, inside `beside`, once the rank no longer waits for them.
    """
    is_unwanted: threading.Event | None = getattr(_beside, "is_unwanted", None)

    def run(item: Any) -> Any:
        if is_unwanted is not None and is_unwanted.is_set():
            raise RuntimeError("nobody waits for it any more.")
        return work(item)

    cores = len(os.sched_getaffinity(0)) // ranks_on_node()
    with ThreadPoolExecutor(max(2, min(MAX_THREADS, cores))) as executor:
        try:
            return list(executor.map(run, items))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def beside(group: SequenceGroup, work: Callable[[], Result], while_waiting: Callable[[], object] | None) -> Result:
    """Do something that sends nothing; if it fails on one rank, all fail.

    With `while_waiting` it is done in a thread, and all ranks call that until all are done. What `while_waiting` raises
    is raised on this rank as soon as the pieces of work that have begun have ended.
    """
    if while_waiting is None:
        with shared_outcome(group):
            return work()
    is_unwanted = threading.Event()

    def run() -> Result:
        _beside.is_unwanted = is_unwanted
        return work()

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(run)
        try:
            while not all(group.gather_objects(bool(wait([future], WAIT_S).done))):
                while_waiting()
        except BaseException:
            is_unwanted.set()
            raise
        with shared_outcome(group):
            return future.result()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def crc(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def read_all(descriptor: int, data: memoryview, offset: int) -> bool:
    """Fill `data` from a file; return whether the file was long enough."""
    while len(data):
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            return False
        data, offset = data[count:], offset + count
    return True
