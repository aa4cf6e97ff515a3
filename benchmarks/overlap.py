"""What of the communication of a prefill is hidden behind computation, on several GPUs, and how a layer looks in time.

    deepspeed --num_gpus 2 benchmarks/overlap.py --out outputs/overlap --hosts 2 4

Llama-3.1-8B's geometry, random weights, random ids; every rank profiles the same prefill. A collective also waits for
the slowest rank, so that a rank's time in collectives holds the others' delay too. Writes `overlap.json` and, where
matplotlib is installed, `overlap_<hosts>_hosts.png`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.engine.engine import APBEngine
from apb_ds.loading import ModelConfig, load_model
from apb_ds.report.record import environment, write_json

GEOMETRY = Path(__file__).resolve().parents[1] / "configs" / "model" / "llama31_8b.yaml"
WARMUP = 2
REPEATS = 3
SHOWN_COLLECTIVES = 3  # in the figure

COMMUNICATION, ATTENTION, LINEAR, OTHER = "communication", "attention", "linear layers", "other"
KINDS = ((COMMUNICATION, ("nccl",)), (ATTENTION, ("flash", "fmha")), (LINEAR, ("nvjet", "gemm", "cutlass")))
COLOURS = {COMMUNICATION: "tab:red", ATTENTION: "tab:blue", LINEAR: "tab:green", OTHER: "tab:gray"}
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")

Interval = tuple[float, float]


@dataclass(frozen=True)
class Event:
    """Something that ran on the device: microseconds from any beginning, the stream, and what it was."""

    begin: float
    end: float
    stream: int
    kind: str


def kind_of(name: str) -> str:
    """Return what a kernel does, by its name."""
    return next((kind for kind, parts in KINDS if any(part in name.lower() for part in parts)), OTHER)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the times that at least one interval covers, in order, without overlaps."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Return how long intervals that do not overlap are together."""
    return sum(end - begin for begin, end in intervals)


def summarise(events: Sequence[Event]) -> dict[str, float | int]:
    """Return where the time of one rank went, in milliseconds.

    Returns
    -------
    dict
        ``span_ms``: from the first event's begin to the last one's end; ``computing_ms``: in which something else than
        a collective ran; ``communicating_ms``: in which a collective ran, and ``exposed_ms``: in which nothing else
        did; ``idle_ms``: in which nothing ran; ``collectives``: their number.
    """
    everything = union((event.begin, event.end) for event in events)
    sent = [(event.begin, event.end) for event in events if event.kind == COMMUNICATION]
    computed = union((event.begin, event.end) for event in events if event.kind != COMMUNICATION)
    span = everything[-1][1] - everything[0][0]
    return {
        "span_ms": span / 1000,
        "computing_ms": length(computed) / 1000,
        "communicating_ms": length(union(sent)) / 1000,
        "exposed_ms": (length(everything) - length(computed)) / 1000,
        "idle_ms": (span - length(everything)) / 1000,
        "collectives": len(sent),
    }


def window(events: Sequence[Event]) -> list[Event]:
    """Return what ran during a few collectives in the middle of a prefill.

    In time from the end of the first of them: a collective may begin at any time, and ends on all ranks together.
    """
    collectives = [event for event in events if event.kind == COMMUNICATION]
    middle = len(collectives) // 2
    shown = collectives[middle : middle + SHOWN_COLLECTIVES + 1]
    if not shown:
        return []
    begin, end = shown[0].begin, shown[-1].end
    inside = [event for event in events if event.end > begin and event.begin < end]
    zero = shown[0].end
    return [Event(event.begin - zero, event.end - zero, event.stream, event.kind) for event in inside]


def profiled_events(engine: APBEngine, document: Tensor, query: Tensor) -> list[Event]:
    """Return what ran on this rank's device in one prefill."""
    engine.group.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.prefill(document, query)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        found = json.loads(trace.read_text())["traceEvents"]
    events = [
        Event(each["ts"], each["ts"] + each["dur"], int(each["args"].get("stream", 0)), kind_of(each["name"]))
        for each in found
        if each.get("cat") in DEVICE_CATEGORIES
    ]
    return sorted(events, key=lambda event: event.begin)


def measure(engine: APBEngine, document: Tensor, query: Tensor) -> dict[str, Any]:
    """Return prefill times, and of one more prefill what each rank's device did."""
    times = []
    for repeat in range(WARMUP + REPEATS):
        engine.group.barrier()
        context = engine.prefill(document, query)
        if repeat >= WARMUP:
            times.append(max(engine.group.gather_objects(context.prefill_s)))
        del context
    events = profiled_events(engine, document, query)
    here = {**summarise(events), "window": [[e.begin, e.end, e.stream, e.kind] for e in window(events)]}
    return {
        "prefill_s": {"median": statistics.median(times), "runs": times},
        "ranks": engine.group.gather_objects(here),
    }


def draw(path: Path, title: str, ranks: Sequence[dict[str, Any]]) -> None:
    """Draw each rank's streams over time, as `measure` kept them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 1.5 + 1.2 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    labels: list[str] = []
    for rank, found in enumerate(ranks):
        for is_sent in (False, True):
            for kind, colour in COLOURS.items():
                if (kind == COMMUNICATION) == is_sent:
                    bars = [
                        (begin / 1000, (end - begin) / 1000) for begin, end, _, what in found["window"] if what == kind
                    ]
                    axes.broken_barh(bars, (len(labels) - 0.4, 0.8), facecolors=colour)
            labels.append(f"rank {rank}, {'collectives' if is_sent else 'computation'}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, wrap=True)
    figure.legend(
        [Patch(color=colour) for colour in COLOURS.values()], list(COLOURS), loc="outside lower center", ncols=4
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=130944)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hosts", type=int, nargs="+", required=True)
    parser.add_argument("--hosts-per-round", type=int, help="by default the package's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures CUDA devices, and there is none")
    settings = yaml.safe_load(GEOMETRY.read_text()) | {"load_format": "dummy", "num_layers": arguments.layers}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100_000, (1, arguments.num_tokens + arguments.query_tokens), generator=generator)
    torch.cuda.set_device(arguments.local_rank or 0)
    loaded = load_model(ModelConfig.from_dict(settings))
    engine = init_inference(loaded.model, APBConfig(hosts=arguments.hosts[0]))
    document, query = ids.to(engine.device).split([arguments.num_tokens, arguments.query_tokens], dim=1)
    cases = []
    for hosts in arguments.hosts:
        engine.configure(APBConfig(hosts=hosts, hosts_per_round=arguments.hosts_per_round))
        cases.append({"hosts": hosts, **measure(engine, document, query)})
    if not engine.group.is_first:
        return
    given = {name: value for name, value in vars(arguments).items() if name not in ("out", "local_rank")}
    world_size = engine.group.world_size
    write_json(
        arguments.out / "overlap.json",
        {"arguments": given, "ranks": world_size, "cases": cases, **environment(engine.device)},
    )
    for case in cases:
        for rank, found in enumerate(case["ranks"]):
            numbers = ", ".join(f"{name} {value:.1f}" for name, value in found.items() if name != "window")
            print(f"{case['hosts']} hosts, rank {rank}: {numbers}")
        if importlib.util.find_spec("matplotlib") is not None:
            title = f"{arguments.num_tokens} tokens, {case['hosts']} hosts on {world_size} GPUs: a part of a prefill"
            draw(arguments.out / f"overlap_{case['hosts']}_hosts.png", title, case["ranks"])


if __name__ == "__main__":
    main()
