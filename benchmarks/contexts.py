"""How long a context takes to leave the device and to come back: to host memory, to disk, and by a new prefill.

    python benchmarks/contexts.py --folder /tmp --out outputs/contexts.json

Llama-3.1-8B's sizes, random weights, random ids, on one rank. `load` is measured from the page cache and, with the
files' pages dropped from it (posix_fadvise), from disk; where the folder is in memory (tmpfs), that is no disk.
`--layers` and `--num-tokens` make it small enough for a CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.engine.context import Context
from apb_ds.engine.engine import APBEngine
from apb_ds.parallel.consistency import checksum
from apb_ds.report.record import environment, write_json
from benchmarks import common

GIB = 2**30


class Times:
    """Seconds of each step of each repeat, by name, in the order of the first repeat."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.runs: dict[str, list[float]] = {}

    def of(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work and note its time, with what the device has to do."""
        self._synchronize()
        began = time.perf_counter()
        result = work()
        self._synchronize()
        self.runs.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def drop_pages(folder: Path) -> None:
    """Have a folder's files read from disk again."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def stored_bytes(context: Context) -> int:
    """Return the bytes of a context's keys and values, without spare room."""
    return sum(states.nbytes for shard in context.cache.shards().values() for states in shard)


def sums(context: Context) -> Tensor:
    """Return checksums of all keys and values."""
    return torch.stack([checksum(states) for shard in context.cache.shards().values() for states in shard])


def measure(engine: APBEngine, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the runs of each step, and how large the context is."""
    times, saved = Times(engine.device), folder / "context"
    document, query = common.random_request(
        arguments.num_tokens, arguments.query_tokens, engine.device, vocab_size=engine.module.config.vocab_size
    )
    for repeat in range(arguments.repeats + 1):
        engine.configure({"method": "dense"})
        times.of("prefill, dense", partial(engine.prefill, document))
        engine.configure(APBConfig(hosts=arguments.hosts))
        context = times.of("prefill, apb", partial(engine.prefill, document))
        engine.query_logits(query, context=context)
        before = sums(context)
        num_bytes = stored_bytes(context)
        times.of("to_host", context.to_host)
        times.of("to_device", context.to_device)
        times.of("save", partial(context.save, saved))
        del context
        times.of("load, page cache", partial(engine.load_context, saved))
        drop_pages(saved)
        context = times.of("load, disk", partial(engine.load_context, saved))
        engine.query_logits(query, context=context)
        if not torch.equal(before, sums(context)):
            raise RuntimeError("the context is not what it was.")
        del context
        times.of("load to host, page cache", partial(engine.load_context, saved, place="host"))
        shutil.rmtree(saved)
        if repeat == 0:  # kernels were compiled, memory pinned, weights summed
            first, times.runs = times.runs, {}
    steps = {
        name: {
            "median_s": median(runs),
            "runs_s": runs,
            "first_s": first[name][0],
            "gib_per_s": num_bytes / GIB / median(runs),
        }
        for name, runs in times.runs.items()
    }
    return {"bytes": num_bytes, "steps": steps}


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where contexts are saved")
    parser.add_argument("--num-tokens", type=int, default=131008)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="after a first one that is recorded apart")
    arguments = parser.parse_args()
    engine = init_inference(common.load_llama(arguments.layers).model, APBConfig(hosts=arguments.hosts))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(engine, arguments, Path(folder))
    described = common.given(arguments, "folder")
    write_json(arguments.out, {"arguments": described, **found, **environment(engine.device)})
    print(f"{found['bytes'] / GIB:.2f} GiB")
    for name, step in found["steps"].items():
        print(f"{name:26} {step['median_s']:8.3f} s (first {step['first_s']:.3f})  {step['gib_per_s']:7.2f} GiB/s")


if __name__ == "__main__":
    main()
