"""The least time that a prefill and a decode step of ``launch/bench.py`` can take on a device.

    python benchmarks/floors.py --out docs/results/floors.json [bench.json ...]

First the device's rates are measured: matrix products of the model's linear layers, causal and unmasked attention, and
reading memory; each for as long as a prefill lasts, since a device at its power limit slows down. Each case in the
records then has two floors: counted operations over rates for a prefill, and bytes of weights and cache over
bandwidth for a decode step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig
from apb_ds.bench.timing import Stopwatch
from apb_ds.compressors.base import build_compressor
from apb_ds.config import BlockSettings
from apb_ds.ops.kernels import choose_kernels
from apb_ds.plan import plan_request
from apb_ds.report.flops import ModelSizes, PrefillFlops, RankFlops, count_flops
from apb_ds.report.record import environment, write_json
from benchmarks import common

LLAMA_8B = ModelSizes(
    num_layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128, vocab_size=128256
)
CAUSAL_PARTS = ("block_attention", "anchor_attention")
UNMASKED_PARTS = ("to_anchor", "to_passed")
PRODUCT_PARTS = ("document_linear", "anchor_linear", "scoring")


def sustained(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return the seconds of one call, in the second half of a series that takes about `seconds`."""

    def timed(calls: int) -> float:
        watch = Stopwatch(device)
        for _ in range(calls):
            work()
        watch.mark()
        return watch.laps()[0] / calls

    timed(2)
    calls = max(2, int(seconds / 2 / timed(2)))
    timed(calls)
    return timed(calls)


def measure_rates(
    sizes: ModelSizes, tokens: int, buffer_bytes: int, seconds: float, device: torch.device
) -> dict[str, Any]:
    """Measure the device.

    Parameters
    ----------
    tokens : of a block
    buffer_bytes : read to measure bandwidth; more than any cache holds
    seconds : for each measurement

    Returns
    -------
    dict
        ``products``, ``causal``, ``unmasked``: operations per second, and ``bandwidth``: bytes per second, the best
        measured; ``measured``: all measurements; ``kernel``
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    channels = sizes.heads * sizes.head_dim
    shapes = {
        "qkv": (sizes.hidden_size, sizes.qkv_size),
        "o": (channels, sizes.hidden_size),
        "gate or up": (sizes.hidden_size, sizes.intermediate_size),
        "down": (sizes.intermediate_size, sizes.hidden_size),
    }
    products = {}
    for name, (before, after) in shapes.items():
        left, right = draw(tokens, before), draw(after, before) / before**0.5
        products[name] = 2 * tokens * before * after / sustained(partial(torch.matmul, left, right.T), seconds, device)
    kernel = choose_kernels("auto", device, dtype, sizes.head_dim).prefill
    attention = {}
    for name, causal in (("causal", True), ("unmasked", False)):
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        query, key, value = (draw(1, tokens, count, sizes.head_dim).transpose(1, 2) for count in heads)
        attend = partial(kernel, query, key, value, causal, sizes.head_dim**-0.5)
        pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        attention[name] = 4 * sizes.heads * sizes.head_dim * pairs / sustained(attend, seconds, device)
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    reading = source.numel() * 4 / sustained(source.sum, seconds, device)
    half = source.numel() // 2
    copying = 8 * half / sustained(lambda: source[:half].copy_(source[half : 2 * half]), seconds, device)
    return {
        "products": max(products.values()),
        **attention,
        "bandwidth": max(reading, copying),
        "measured": {"products": products, "attention": attention, "reading": reading, "copying": copying},
        "kernel": kernel.name,
        "tokens": tokens,
    }


def prefill_floor(flops: RankFlops, rates: dict[str, Any]) -> float:
    """Return the seconds of a rank's prefill at the measured rates."""
    groups = (("products", PRODUCT_PARTS), ("causal", CAUSAL_PARTS), ("unmasked", UNMASKED_PARTS))
    return sum(getattr(flops, part) / rates[rate] for rate, parts in groups for part in parts)


def step_bytes(sizes: ModelSizes, cached_tokens: int, itemsize: int) -> int:
    """Return the bytes that a decode step must read: all weights but the embedding, and keys and values."""
    cache = 2 * cached_tokens * sizes.num_layers * sizes.kv_heads * sizes.head_dim
    return itemsize * (sizes.linear_weights + sizes.hidden_size * sizes.vocab_size + cache)


def floors_of(record: dict[str, Any], rates: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each case of a benchmark's record with its times over their floors.

    Parameters
    ----------
    record : of ``launch/bench.py``, made with ``model.load_format=dummy``
    """
    geometry = record["config"]["model"]["geometry"]
    layers = record["model"]["layers"]["measured"]
    sizes = ModelSizes.from_config(SimpleNamespace(**{**geometry, "num_hidden_layers": layers}))
    assert sizes is not None
    found = []
    for case in record["cases"]:
        if case["status"] != "ok" or case["settings"] is None:
            continue
        flops = _flops(sizes, case, record["bench"]["query_tokens"])
        floor = max(prefill_floor(rank, rates) for rank in flops.ranks)
        entry = {
            "name": case["name"],
            "document_tokens": case["document_tokens"],
            "prefill_s": case["prefill"]["median_s"],
            "prefill_floor_s": floor,
            "prefill_over_floor": case["prefill"]["median_s"] / floor,
        }
        if case.get("decode"):
            step = 1000 * step_bytes(sizes, case["document_tokens"], itemsize=2) / rates["bandwidth"]
            measured = case["decode"]["median_ms_per_token"]
            entry |= {"decode_ms": measured, "decode_floor_ms": step, "decode_over_floor": measured / step}
        found.append(entry)
    return found


def _flops(sizes: ModelSizes, case: dict[str, Any], query_tokens: int) -> PrefillFlops:
    config = APBConfig(**{name: value for name, value in case["settings"].items() if value is not None})
    plan = plan_request(config, case["document_tokens"], query_tokens, case["ranks"])
    settings = config.settings
    compressor = build_compressor(settings) if isinstance(settings, BlockSettings) else None
    return count_flops(sizes, plan, compressor=compressor)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("records", nargs="*", type=Path, help="bench.json of launch/bench.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16384, help="of a block")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--buffer-gib", type=float, default=8.0, help="size of the memory read to measure bandwidth")
    parser.add_argument("--rates", type=Path, help="an earlier record of this script; take its rates")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.rates:
        record = json.loads(arguments.rates.read_text())
    else:
        rates = measure_rates(LLAMA_8B, arguments.tokens, int(arguments.buffer_gib * 2**30), arguments.seconds, device)
        record = {"what": "operations and bytes per second; times over their floors", "rates": rates}
        record |= environment(device)
    rates = record["rates"]
    record["cases"] = {str(path): floors_of(json.loads(path.read_text()), rates) for path in arguments.records}
    write_json(arguments.out, record)
    print(
        f"products {rates['products'] / 1e12:.0f}, causal attention {rates['causal'] / 1e12:.0f}, unmasked "
        f"{rates['unmasked'] / 1e12:.0f} TFLOP/s; {rates['bandwidth'] / 1e12:.2f} TB/s"
    )
    for path, entries in record["cases"].items():
        for entry in entries:
            decode = f", decode x{entry['decode_over_floor']:.2f}" if "decode_ms" in entry else ""
            print(
                f"{path}: {entry['name']}, {entry['document_tokens']} tokens: {entry['prefill_s']:.3f} s, "
                f"floor {entry['prefill_floor_s']:.3f}, x{entry['prefill_over_floor']:.2f}{decode}"
            )


if __name__ == "__main__":
    main()
