"""Which kernels a prefill of one rank spends its time in, and where the device waits for the next one.

    python benchmarks/prefill_kernels.py --out kernels.json --layers 8 --hosts 16 --ranks 8 --rank 7

Llama-3.1-8B's geometry, random weights, random ids, the other ranks emulated. On CPU the operations' own times take the
kernels' place, and no gaps are measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.engine.engine import APBEngine
from apb_ds.loading import ModelConfig, load_model
from apb_ds.parallel.emulated import emulated_groups
from apb_ds.report.record import environment, write_json

GEOMETRY = Path(__file__).resolve().parents[1] / "configs" / "model" / "llama31_8b.yaml"
WARMUP = 3
# What is shorter lies within the time that the device needs to start a kernel.
MIN_GAP_US = 5.0

Span = tuple[float, float, str]  # begin and end in microseconds, and a kernel's name


def idle_gaps(spans: list[Span]) -> dict[tuple[str, str], list[float]]:
    """Return the times, in microseconds, in which nothing ran, by the kernels before and after."""
    gaps: dict[tuple[str, str], list[float]] = defaultdict(list)
    end, before = None, ""
    for begin, stop, name in sorted(spans):
        if end is not None and begin - end >= MIN_GAP_US:
            gaps[before, name].append(begin - end)
        if end is None or stop > end:
            end, before = stop, name
    return gaps


def profile_prefill(engine: APBEngine, document: Tensor, query: Tensor) -> dict[str, Any]:
    """Profile one prefill, after some that warm up.

    Returns
    -------
    dict
        ``span_ms``: from the first kernel's begin to the last one's end; ``kernels_ms``: all kernels' times, and
        ``kernels``: by name, the longest first; ``idle_ms`` and ``gaps``: likewise, of gaps of 5 us and more.
    """
    for _ in range(WARMUP):
        engine.prefill(document, query)
    on_cuda = engine.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        engine.prefill(document, query)
        if on_cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [event for event in profiler.events() or [] if event.device_type == kind]
    spans = [(event.time_range.start, event.time_range.end, event.name) for event in events]
    times: dict[str, list[float]] = defaultdict(list)
    for event, (begin, end, name) in zip(events, spans, strict=True):
        times[name].append(end - begin if on_cuda else event.self_cpu_time_total)
    gaps = idle_gaps(spans) if on_cuda else {}
    return {
        "span_ms": (max(span[1] for span in spans) - min(span[0] for span in spans)) / 1000,
        "kernels_ms": sum(map(sum, times.values())) / 1000,
        "idle_ms": sum(map(sum, gaps.values())) / 1000,
        "kernels": _longest_first({(name,): found for name, found in times.items()}, ("name",)),
        "gaps": _longest_first(gaps, ("after", "before")),
    }


def _longest_first(times: dict[Any, list[float]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {**dict(zip(names, key, strict=True)), "ms": sum(found) / 1000, "count": len(found)} for key, found in ordered
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=130944)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=8, help="1: nothing is emulated")
    parser.add_argument("--rank", type=int, default=7)
    parser.add_argument("--shown", type=int, default=25, help="lines of each table that are printed")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    settings = yaml.safe_load(GEOMETRY.read_text()) | {"load_format": "dummy", "num_layers": arguments.layers}
    loaded = load_model(ModelConfig.from_dict(settings))
    group = emulated_groups(arguments.ranks)[arguments.rank] if arguments.ranks > 1 else None
    engine = init_inference(loaded.model, APBConfig(hosts=arguments.hosts), group=group)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100_000, (1, arguments.num_tokens + arguments.query_tokens), generator=generator)
    document, query = ids.to(loaded.device).split([arguments.num_tokens, arguments.query_tokens], dim=1)
    found = profile_prefill(engine, document, query)
    given = {name: value for name, value in vars(arguments).items() if name not in ("out", "shown")}
    write_json(arguments.out, {"arguments": given, **found, **environment(loaded.device)})
    print(f"{found['span_ms']:.1f} ms, kernels {found['kernels_ms']:.1f} ms, idle {found['idle_ms']:.1f} ms")
    for kernel in found["kernels"][: arguments.shown]:
        print(f"{kernel['ms']:9.3f} ms {kernel['count']:6d}  {kernel['name'][:100]}")
    for gap in found["gaps"][: arguments.shown]:
        print(f"{gap['ms']:9.3f} ms {gap['count']:6d}  {gap['after'][:48]} ... {gap['before'][:48]}")


if __name__ == "__main__":
    main()
