"""The share of attention that each compressor's passed tokens hold, and the time it takes to choose them.

    python benchmarks/compressors.py --out docs/results/attention_mass.json [--heads heads.pt] [text files]

The plain model reads document and judged tokens once. In every layer each compressor chooses, from the model's own
states, what a prefill would pass on: in each block but the last, among the tokens that the anchor does not hold, as
many as the plan says. Recall is the share of the attention paid to all tokens that may be passed on that goes to those
which are, for two kinds of observers:

    judged        the tokens after the document
    later_blocks  every 16th token of the document, each observing the blocks before its own

It is taken over all blocks together for each layer and KV head, then averaged over these. The last layer is left out: a
prefill passes nothing on there. ``query`` observes with the document's last 64 tokens, at their own positions. Two rows
are not compressors: ``best`` keeps the tokens that hold most, and ``mean`` is what random tokens hold on average.

Milliseconds are for scoring, choosing and gathering one block of one layer of Llama-3.1-8B's sizes, on random states,
launches included.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig
from apb_ds.bench.timing import Stopwatch, spread
from apb_ds.compressors import BlockStates, Compressor, build_compressor
from apb_ds.compressors.base import RETAINING_HEADS
from apb_ds.compressors.heads_and_window import HeadsAndWindowCompressor
from apb_ds.compressors.retaining_heads import HeadSizes, RetainingHeads, RetainingHeadsCompressor
from apb_ds.config import BlockSettings
from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.loading.heads import head_sizes, load_heads
from apb_ds.ops.compiled import can_compile
from apb_ds.ops.selection import select_top
from apb_ds.plan import Plan, plan_request, split_evenly
from apb_ds.report.fitting import ABSENT, Column, FittedTable
from apb_ds.report.record import environment, write_json
from apb_ds.report.table import make_console
from apb_ds.training.heads.labels import View, attention_received, make_view
from apb_ds.training.heads.observe import observe_layers
from benchmarks import common

LATER_STEP = 16
BEST, MEAN = "best", "mean"
LLAMA = HeadSizes(num_layers=1, heads=32, kv_heads=8, head_dim=128, activation="silu")
WARM_UP, REPEATS = 3, 20

Rows = dict[str, list[Compressor]]  # a name, and the compressors whose mean it shows (several seeds of ``random``)
Key = tuple[str, str, str]  # observers, ratio, row


@dataclass(frozen=True)
class Layer:
    """What the plain model has in one layer of document and judged tokens.

    Attributes
    ----------
    projections : (tokens, (heads + 2 kv_heads) head_dim), before rotation
    queries : (1, heads, tokens, head_dim), rotated
    keys, values : (1, kv_heads, tokens, head_dim), keys rotated
    scale : factor on the logits
    num_document : length of the document, which comes first
    """

    index: int
    projections: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    num_document: int

    def block(self, start: int, stop: int) -> BlockStates:
        """Return the states of the document's tokens from `start` to `stop`, as a compressor gets them."""
        first_observer = max(0, self.num_document - common.OBSERVERS)
        return BlockStates(
            queries=self.queries[:, :, start:stop],
            keys=self.keys[:, :, start:stop],
            values=self.values[:, :, start:stop],
            start=start,
            layer_idx=self.index,
            scale=self.scale,
            anchor_queries=self.queries[:, :, first_observer : self.num_document],
            projections=self.projections[None, start:stop],
        )


def _new_compressor(**options: Any) -> Compressor:
    settings = APBConfig(**options).settings
    assert isinstance(settings, BlockSettings)
    return build_compressor(settings)


def make_rows(heads: RetainingHeads | None, seeds: int = common.SEEDS) -> Rows:
    """Return the compressors to compare; `heads`, if any, have the device and dtype of the states."""
    rows: Rows = {name: [_new_compressor(compressor=name)] for name in common.UNTRAINED}
    if heads is not None:
        rows[RETAINING_HEADS] = [RetainingHeadsCompressor(heads)]
        rows["heads_and_window"] = [HeadsAndWindowCompressor(heads)]
    rows["random"] = [_new_compressor(compressor="random", seed=seed) for seed in range(seeds)]
    return rows


def make_plans(num_tokens: int, hosts: int, ratios: Sequence[float]) -> dict[str, Plan]:
    """Return for each ratio what a prefill without a query in its anchor passes on; ValueError if that is nothing."""
    plans = {
        f"{ratio:g}": plan_request(APBConfig(hosts=hosts, compression_ratio=ratio), num_tokens, 0) for ratio in ratios
    }
    for plan in plans.values():
        if not any(plan.is_passed_on(host) for host in range(plan.hosts)):
            raise ValueError(f"--hosts={hosts} passes on nothing of --num-tokens={num_tokens}; raise one of them.")
    return plans


def make_views(num_document: int, judged: int, hosts: int, device: torch.device) -> dict[str, View]:
    """Return who observes what: judged tokens the whole document, some of its own tokens the blocks before theirs."""
    second_block = split_evenly(num_document, hosts)[1][0]
    after = torch.arange(num_document, num_document + judged, device=device)
    later = torch.arange(second_block, num_document, LATER_STEP, device=device)
    return {"judged": make_view(after, num_document), "later_blocks": make_view(later, num_document, hosts)}


def layer_recall(layer: Layer, plans: dict[str, Plan], views: dict[str, View], rows: Rows) -> dict[Key, Tensor]:
    """Return the share of attention that passed tokens hold, (compressors of the row, kv_heads), float32."""
    received = {}  # (kv_heads, num_document)
    for name, view in views.items():
        observed = attention_received(view, layer.queries, layer.keys, layer.scale)
        received[name] = F.pad(observed, (0, layer.num_document - view.num_scored))
    shares: dict[Key, Tensor] = {}
    for ratio, plan in plans.items():
        totals: dict[str, Any] = dict.fromkeys(received, 0.0)
        held: dict[Key, Any] = defaultdict(float)
        for host in filter(plan.is_passed_on, range(plan.hosts)):
            (start, stop), count, eligible = plan.blocks[host], plan.kept_lengths[host], plan.num_eligible(host)
            block = layer.block(start, stop)
            chosen = {row: [each.choose(block, count, eligible) for each in of_row] for row, of_row in rows.items()}
            for name, mass in received.items():
                of_block, allowed = mass[:, start:stop], mass[:, stop - eligible : stop].contiguous()
                total = allowed.sum(dim=1)
                totals[name] += total
                held[name, ratio, BEST] += _sum_at(allowed, [select_top(allowed, count)])
                held[name, ratio, MEAN] += (total * count / eligible).unsqueeze(0)
                for row, of_row in chosen.items():
                    held[name, ratio, row] += _sum_at(of_block, of_row)
        shares |= {key: mass / totals[key[0]] for key, mass in held.items()}
    return shares


def _sum_at(mass: Tensor, choices: Sequence[Tensor]) -> Tensor:
    """Return the sums of mass, (kv_heads, tokens), over each of several choices, (choices, kv_heads)."""
    return torch.stack([mass.gather(1, chosen).sum(dim=1) for chosen in choices])


def text_recall(
    model: Any, tokens: Tensor, num_document: int, plans: dict[str, Plan], views: dict[str, View], rows: Rows
) -> dict[Key, Tensor]:
    """Return the shares of `layer_recall` in every layer but the last, (layers, compressors, kv_heads), on the CPU.

    Parameters
    ----------
    tokens : (1, tokens), int64, document and judged tokens
    """
    found: dict[Key, list[Tensor]] = defaultdict(list)

    def observe(index: int, projections: Tensor, queries: Tensor, keys: Tensor, scale: float, values: Tensor) -> None:
        if index < model.config.num_hidden_layers - 1:
            layer = Layer(index, projections, queries, keys, values, scale, num_document)
            for key, shares in layer_recall(layer, plans, views, rows).items():
                found[key].append(shares)

    observe_layers(model, tokens, observe)
    return {key: torch.stack(shares).cpu() for key, shares in found.items()}


def summarise(by_text: dict[str, dict[Key, Tensor]]) -> dict[str, Any]:
    """Return recall by observers, ratio and row: over all, by text, by layer, by seed, and minus that of ``random``.

    Parameters
    ----------
    by_text : what `text_recall` gives, by the text's name
    """
    stacked = {
        key: torch.stack([shares[key] for shares in by_text.values()]).double() for key in next(iter(by_text.values()))
    }
    means = {key: shares.flatten(1).mean(dim=1).tolist() for key, shares in stacked.items()}
    summary: dict[str, Any] = {}
    for (observers, ratio, row), shares in stacked.items():
        ours = means[observers, ratio, row]
        numbers = {
            "mean": fmean(ours),
            "minus_random": common.mean_difference(ours, means[observers, ratio, "random"]),
            "by_text": dict(zip(by_text, ours, strict=True)),
            "by_layer": shares.mean(dim=(0, 2, 3)).tolist(),
        }
        if row == "random":
            numbers["by_seed"] = shares.mean(dim=(0, 1, 3)).tolist()
        summary.setdefault(observers, {}).setdefault(ratio, {})[row] = numbers
    return summary


def measure_recall(arguments: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """Measure recall on all texts; return this part of the record."""
    num_document, device = arguments.num_tokens, loaded.device
    plans = make_plans(num_document, arguments.hosts, arguments.ratios)
    views = make_views(num_document, arguments.judged, arguments.hosts, device)
    heads = None
    if arguments.heads is not None:
        heads = load_heads(str(arguments.heads), head_sizes(loaded.model)).placed(device, loaded.dtype)
    rows = make_rows(heads)
    samples, sources = common.read_texts(arguments, loaded)
    by_text = {}
    for sample in samples:
        tokens = torch.cat((sample.document_ids, sample.query_ids), dim=1).to(device)
        by_text[sample.labels["text"]] = text_recall(loaded.model, tokens, num_document, plans, views, rows)
        print(f"{sample.labels['text']}: done", flush=True)
    return {
        "what": "share of the attention paid to tokens that may be passed on which those hold that are passed on; over "
        "all blocks but the last, mean over KV heads and all layers but the last",
        "observers": {
            "judged": f"the {arguments.judged} tokens behind the document",
            "later_blocks": f"every {LATER_STEP}th token of the document from the second block on, of earlier blocks",
        },
        "texts": sources,
        "document_tokens": num_document,
        "judged_tokens": arguments.judged,
        "hosts": arguments.hosts,
        "kept": {ratio: describe_plan(plan) for ratio, plan in plans.items()},
        "recall": summarise(by_text),
        "model": Path(arguments.model).name,
        "dtype": str(loaded.dtype),
        "heads": common.describe_heads(arguments.heads),
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return how many tokens of each block may be passed on and are, for the blocks of which some are."""
    hosts = [host for host in range(plan.hosts) if plan.is_passed_on(host)]
    return {
        "anchor_tokens": plan.anchor_length,
        "eligible_tokens": [plan.num_eligible(host) for host in hosts],
        "kept_tokens": [plan.kept_lengths[host] for host in hosts],
    }


@torch.no_grad()
def measure_times(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time each compressor on one block of one layer; return this part of the record."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_fused = device.type == "cuda" and can_compile(device)
    heads = RetainingHeads.random(LLAMA, arguments.heads_hidden).placed(device, dtype)
    block = random_block(arguments.block, device, dtype, is_fused)
    times: dict[str, dict[str, Any]] = {}
    for ratio in arguments.ratios:
        count = math.ceil(arguments.block / ratio)
        times[f"{ratio:g}"] = {
            name: {"kept_tokens": count, **time_compressor(compressor, block, count)}
            for name, (compressor, *_) in make_rows(heads, seeds=1).items()
        }
    return {
        "what": f"milliseconds of scoring, choosing and gathering one block of one layer, launches included: "
        f"{REPEATS} runs after {WARM_UP} that do not count",
        "clock": "CUDA events" if device.type == "cuda" else "the process's clock, on the CPU",
        "geometry": asdict(LLAMA),
        "block_tokens": arguments.block,
        "query_observers": common.OBSERVERS,
        "heads_hidden": arguments.heads_hidden,
        "dtype": str(dtype),
        "fused": is_fused,
        "times": times,
    }


def random_block(num_tokens: int, device: torch.device, dtype: torch.dtype, is_fused: bool) -> BlockStates:
    """Return random states of one block, of Llama-3.1-8B's sizes."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, device=device).to(dtype)

    return BlockStates(
        queries=draw(LLAMA.heads, num_tokens, LLAMA.head_dim),
        keys=draw(LLAMA.kv_heads, num_tokens, LLAMA.head_dim),
        values=draw(LLAMA.kv_heads, num_tokens, LLAMA.head_dim),
        start=0,
        layer_idx=0,
        scale=LLAMA.head_dim**-0.5,
        anchor_queries=draw(LLAMA.heads, common.OBSERVERS, LLAMA.head_dim),
        projections=draw(num_tokens, LLAMA.qkv_size),
        fused=is_fused,
    )


def time_compressor(compressor: Compressor, block: BlockStates, count: int) -> dict[str, Any]:
    """Return the milliseconds that `compress` takes."""
    into = block.keys.new_empty((2, block.kv_heads, count, block.keys.shape[3]))
    for _ in range(WARM_UP):
        compressor.compress(block, count, block.num_tokens, into)
    watch = Stopwatch(block.keys.device)
    for _ in range(REPEATS):
        compressor.compress(block, count, block.num_tokens, into)
        watch.mark()
    return spread([1000 * lap for lap in watch.laps()], "ms")


def make_table(record: dict[str, Any]) -> FittedTable:
    """Return a row for each compressor: recall by observers and ratio, and milliseconds by ratio."""
    recall, times = record["attention_mass"]["recall"], record["milliseconds"]["times"]
    keys = [(observers, ratio) for observers, by_ratio in recall.items() for ratio in by_ratio]
    names = [f"{observers.replace('_', ' ')}, 1/{ratio}" for observers, ratio in keys]
    columns = [
        Column("compressor"),
        *(Column(name, drop=1) for name in (*names, *(f"ms, 1/{ratio}" for ratio in times))),
    ]
    table = FittedTable(columns, title="share of attention that passed tokens hold, and ms of one block", split=True)
    for name in _sorted_rows(recall):
        shares = [f"{recall[observers][ratio][name]['mean']:.1%}" for observers, ratio in keys]
        timed = [f"{of_ratio[name]['median_ms']:.3f}" if name in of_ratio else ABSENT for of_ratio in times.values()]
        table.add_row(name, *shares, *timed)
    return table


def _sorted_rows(recall: dict[str, Any]) -> list[str]:
    """Return the rows by recall for the first observers at the first ratio, the highest first."""
    first = next(iter(next(iter(recall.values())).values()))
    return sorted(first, key=lambda name: -first[name]["mean"])


def draw_recall(path: Path, part: dict[str, Any]) -> None:
    """Draw each compressor's recall as bars, and that of random tokens as a line, as PNG.

    Parameters
    ----------
    part : of the record, as `measure_recall` returns it
    """
    from matplotlib.figure import Figure

    recall = part["recall"]
    names = [name for name in _sorted_rows(recall) if name != MEAN]
    figure = Figure(figsize=(6 * len(recall), 4.5), layout="constrained")
    panels = figure.subplots(1, len(recall), squeeze=False, sharey=True)[0]
    for axes, (observers, by_ratio) in zip(panels, recall.items(), strict=True):
        width = 0.8 / len(by_ratio)
        for number, (ratio, rows) in enumerate(by_ratio.items()):
            lefts = [index + (number - (len(by_ratio) - 1) / 2) * width for index in range(len(names))]
            bars, line = (f"one in {ratio} kept", f"one in {ratio}, at random") if axes is panels[0] else (None, None)
            axes.bar(lefts, [100 * rows[name]["mean"] for name in names], width, color=f"C{number}", label=bars)
            axes.axhline(100 * rows[MEAN]["mean"], color=f"C{number}", linestyle="--", label=line)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_title(f"observers: {part['observers'][observers]}", fontsize="small", wrap=True)
        axes.set_ylabel("attention on passed tokens, %")
    figure.suptitle(f"{part['model']}, {part['document_tokens']} tokens over {part['hosts']} hosts")
    figure.legend(loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default this process's."""
    parser = common.make_parser(__doc__)
    common.add_text_arguments(parser)
    parser.add_argument("--ratios", nargs="+", type=float, default=[8, 16], help="compression ratios, after the texts")
    parser.add_argument("--block", type=int, default=8192, help="tokens of the block that is timed")
    parser.add_argument("--heads-hidden", type=int, default=1024, help="hidden size of the random heads that are timed")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")
    arguments = parser.parse_args(given)
    common.check_arguments(parser, arguments)
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure recall and times; return the record."""
    loaded = load_model(ModelConfig(path=arguments.model, dtype=arguments.dtype))
    return {
        "attention_mass": measure_recall(arguments, loaded),
        "milliseconds": measure_times(arguments, loaded.device),
        **environment(loaded.device),
    }


def main() -> None:
    """Measure; write the record, draw the figure and print the table."""
    arguments = parse_arguments()
    record = measure(arguments)
    write_json(arguments.out, record)
    if arguments.figure is not None:
        draw_recall(arguments.figure, record["attention_mass"])
    make_console().print(make_table(record))


if __name__ == "__main__":
    main()
