"""How much of a prefill's communication is hidden behind computation, on several GPUs, and a timeline of some layers.

    deepspeed --num_gpus 2 benchmarks/overlap.py --out outputs/overlap --hosts 2 4

Llama-3.1-8B's sizes, random weights, random ids; every rank profiles the same prefill. A collective also waits for the
slowest rank, so a rank's time in collectives includes the others' delay. Writes `overlap.json` and, if matplotlib is
installed, `overlap_<hosts>_hosts.png`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.engine.engine import APBEngine
from apb_ds.report.figures import can_draw, new_figure
from apb_ds.report.record import environment, write_json
from benchmarks import common
from benchmarks.common import Event

WARMUP = 2
REPEATS = 3
SHOWN_COLLECTIVES = 3  # in the figure

COMMUNICATION, ATTENTION, LINEAR, OTHER = "communication", "attention", "linear layers", "other"
KINDS = ((COMMUNICATION, ("nccl",)), (ATTENTION, ("flash", "fmha")), (LINEAR, ("nvjet", "gemm", "cutlass")))
COLOURS = {COMMUNICATION: "tab:red", ATTENTION: "tab:blue", LINEAR: "tab:green", OTHER: "tab:gray"}

Interval = tuple[float, float]


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


def covered(events: Iterable[Event]) -> float:
    """Return how long at least one of the events ran."""
    return sum(end - begin for begin, end in union((event.begin, event.end) for event in events))


def summarise(events: Sequence[Event]) -> dict[str, float | int]:
    """Return where the time of one rank went, in milliseconds.

    Returns
    -------
    dict
        ``span_ms``: from the first begin to the last end; ``computing_ms``: while anything but a collective ran;
        ``communicating_ms``: while a collective ran, and ``exposed_ms``: while nothing else did; ``idle_ms``: while
        nothing ran; ``collectives``: their number.
    """
    span = max(event.end for event in events) - min(event.begin for event in events)
    sent = [event for event in events if kind_of(event.name) == COMMUNICATION]
    busy, computing = covered(events), covered(event for event in events if kind_of(event.name) != COMMUNICATION)
    return {
        "span_ms": span / 1000,
        "computing_ms": computing / 1000,
        "communicating_ms": covered(sent) / 1000,
        "exposed_ms": (busy - computing) / 1000,
        "idle_ms": (span - busy) / 1000,
        "collectives": len(sent),
    }


def window(events: Sequence[Event]) -> list[list[Any]]:
    """Return what ran during a few collectives in the middle of a prefill: begin, end, stream and kind.

    Times count from the end of the first of them: a collective may begin at any time, and ends on all ranks together.
    """
    collectives = [event for event in events if kind_of(event.name) == COMMUNICATION]
    middle = len(collectives) // 2
    shown = collectives[middle : middle + SHOWN_COLLECTIVES + 1]
    return [
        [event.begin - shown[0].end, event.end - shown[0].end, event.stream, kind_of(event.name)]
        for event in events
        if shown and event.end > shown[0].begin and event.begin < shown[-1].end
    ]


def measure(engine: APBEngine, document: Tensor, query: Tensor) -> dict[str, Any]:
    """Return prefill times, and what each rank's device did in one more prefill."""
    times = []
    for repeat in range(WARMUP + REPEATS):
        engine.group.barrier()
        prefill_s = engine.prefill(document, query).prefill_s
        if repeat >= WARMUP:
            times.append(max(engine.group.gather_objects(prefill_s)))
    engine.group.barrier()
    events = common.profiled_events(lambda: engine.prefill(document, query), engine.device)
    here = {**summarise(events), "window": window(events)}
    return {"prefill_s": {"median": median(times), "runs": times}, "ranks": engine.group.gather_objects(here)}


def draw(path: Path, title: str, ranks: Sequence[dict[str, Any]]) -> None:
    """Draw each rank's computation and collectives over time, from what `measure` returns."""
    from matplotlib.patches import Patch

    figure, axes = new_figure(11, 1.5 + 1.2 * len(ranks))
    for rank, found in enumerate(ranks):
        for begin, end, _, kind in found["window"]:
            bar, row = (begin / 1000, (end - begin) / 1000), 2 * rank + (kind == COMMUNICATION)
            axes.broken_barh([bar], (row - 0.4, 0.8), facecolors=COLOURS[kind])
    names = ("computation", "collectives")
    axes.set_yticks(range(2 * len(ranks)), [f"rank {rank}, {name}" for rank in range(len(ranks)) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, wrap=True)
    patches = [Patch(color=colour) for colour in COLOURS.values()]
    figure.legend(patches, list(COLOURS), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, default=130944)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hosts", type=int, nargs="+", required=True)
    parser.add_argument("--hosts-per-round", type=int, help="by default the package's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs CUDA devices.")
    torch.cuda.set_device(arguments.local_rank or 0)
    engine = init_inference(common.load_llama(arguments.layers).model, APBConfig(hosts=arguments.hosts[0]))
    document, query = common.random_request(arguments.num_tokens, arguments.query_tokens, engine.device)
    cases = []
    for hosts in arguments.hosts:
        engine.configure(APBConfig(hosts=hosts, hosts_per_round=arguments.hosts_per_round))
        cases.append({"hosts": hosts, **measure(engine, document, query)})
    if not engine.group.is_first:
        return
    world_size = engine.group.world_size
    record = {"arguments": common.given(arguments, "local_rank"), "ranks": world_size, "cases": cases}
    write_json(arguments.out / "overlap.json", record | environment(engine.device))
    for case in cases:
        for rank, found in enumerate(case["ranks"]):
            numbers = ", ".join(f"{name} {value:.1f}" for name, value in found.items() if name != "window")
            print(f"{case['hosts']} hosts, rank {rank}: {numbers}")
        if can_draw():
            title = f"{arguments.num_tokens} tokens, {case['hosts']} hosts on {world_size} GPUs: a part of a prefill"
            draw(arguments.out / f"overlap_{case['hosts']}_hosts.png", title, case["ranks"])


if __name__ == "__main__":
    main()
