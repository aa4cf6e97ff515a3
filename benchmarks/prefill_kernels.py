"""Which kernels a prefill of one rank spends its time in, and where the device waits for the next one.

    python benchmarks/prefill_kernels.py --out kernels.json --layers 8 --hosts 16 --ranks 8 --rank 7

Llama-3.1-8B's sizes, random weights, random ids, the other ranks emulated. On CPU operations take the place of kernels,
and gaps are not measured.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.engine.engine import APBEngine
from apb_ds.parallel.emulated import emulated_groups
from apb_ds.report.record import environment, write_json
from benchmarks import common
from benchmarks.common import Event

WARMUP = 3
MIN_GAP_US = 5.0  # a shorter gap is the time that the device needs to start a kernel


def idle_gaps(events: Iterable[Event]) -> dict[tuple[str, str], list[float]]:
    """Return the times, in microseconds, in which nothing ran, by the kernels before and after."""
    gaps: dict[tuple[str, str], list[float]] = defaultdict(list)
    last: Event | None = None
    for event in sorted(events, key=lambda event: event.begin):
        if last is not None and event.begin - last.end >= MIN_GAP_US:
            gaps[last.name, event.name].append(event.begin - last.end)
        if last is None or event.end > last.end:
            last = event
    return gaps


def profile_prefill(engine: APBEngine, document: Tensor, query: Tensor) -> dict[str, Any]:
    """Profile one prefill, after a few to warm up.

    Returns
    -------
    dict
        ``span_ms``: from the first kernel's begin to the last one's end; ``kernels_ms``: all kernels' times, and
        ``kernels``: by name, the longest first; ``idle_ms`` and ``gaps``: likewise for gaps of 5 us and more.
    """
    for _ in range(WARMUP):
        engine.prefill(document, query)
    events = common.profiled_events(lambda: engine.prefill(document, query), engine.device)
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for event in events:
        times[(event.name,)].append(event.busy)
    gaps = idle_gaps(events) if engine.device.type == "cuda" else {}
    return {
        "span_ms": (max(event.end for event in events) - events[0].begin) / 1000,
        "kernels_ms": sum(map(sum, times.values())) / 1000,
        "idle_ms": sum(map(sum, gaps.values())) / 1000,
        "kernels": _longest_first(times, ("name",)),
        "gaps": _longest_first(gaps, ("after", "before")),
    }


def _longest_first(times: dict[Any, list[float]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {**dict(zip(names, key, strict=True)), "ms": sum(found) / 1000, "count": len(found)} for key, found in ordered
    ]


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, default=130944)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=8, help="1 emulates nothing")
    parser.add_argument("--rank", type=int, default=7)
    parser.add_argument("--shown", type=int, default=25, help="lines of each table to print")
    arguments = parser.parse_args()
    group = emulated_groups(arguments.ranks)[arguments.rank] if arguments.ranks > 1 else None
    engine = init_inference(common.load_llama(arguments.layers).model, APBConfig(hosts=arguments.hosts), group=group)
    document, query = common.random_request(arguments.num_tokens, arguments.query_tokens, engine.device)
    found = profile_prefill(engine, document, query)
    write_json(arguments.out, {"arguments": common.given(arguments, "shown"), **found, **environment(engine.device)})
    print(f"{found['span_ms']:.1f} ms, kernels {found['kernels_ms']:.1f} ms, idle {found['idle_ms']:.1f} ms")
    for kernel in found["kernels"][: arguments.shown]:
        print(f"{kernel['ms']:9.3f} ms {kernel['count']:6d}  {kernel['name'][:100]}")
    for gap in found["gaps"][: arguments.shown]:
        print(f"{gap['ms']:9.3f} ms {gap['count']:6d}  {gap['after'][:48]} ... {gap['before'][:48]}")


if __name__ == "__main__":
    main()
