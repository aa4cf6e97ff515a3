"""How long a prefill and a decode step of ``launch/bench.py`` would take if the device did nothing but the inevitable.

    python benchmarks/floors.py --out docs/results/floors.json [bench.json ...]

Measured are the rates of the device: matrix products of the model's linear layers, attention causal and not, and
reading memory; each for as long as a prefill works, since a device at its power limit slows down. From them and the
counted operations and bytes of each case in the benchmarks' records follow two floors: operations over rates for
a prefill, and weights and cache over bandwidth for a decode step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig
from apb_ds.compressors.base import build_compressor
from apb_ds.config import BlockSettings
from apb_ds.ops.kernels import choose_kernels
from apb_ds.plan import plan_request
from apb_ds.report.flops import ModelSizes, PrefillFlops, RankFlops, count_flops
from apb_ds.report.record import environment, write_json

LLAMA_8B = ModelSizes(
    num_layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128, vocab_size=128256
)
CAUSAL_PARTS = ("block_attention", "anchor_attention")
UNMASKED_PARTS = ("to_anchor", "to_passed")
PRODUCT_PARTS = ("document_linear", "anchor_linear", "scoring")


def sustained(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return the seconds of one call, in the second half of as many as take about `seconds`."""

    def timed(calls: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        return (time.perf_counter() - began) / calls

    timed(2)
    calls = max(2, int(seconds / 2 / timed(2)))
    timed(calls)
    return timed(calls)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(
    sizes: ModelSizes, tokens: int, buffer_bytes: int, seconds: float, device: torch.device
) -> dict[str, Any]:
    """Measure the device.

    Parameters
    ----------
    tokens : of a block
    buffer_bytes : of what is read to measure bandwidth; more than any cache holds
    seconds : for each measurement

    Returns
    -------
    dict
        ``products``, ``causal``, ``unmasked``: operations a second, and ``bandwidth``: bytes a second, the best of what
        was measured; ``measured``: all of it; ``kernel``
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    channels = sizes.heads * sizes.head_dim
    shapes = {
        "qkv": (sizes.hidden_size, channels + 2 * sizes.kv_heads * sizes.head_dim),
        "o": (channels, sizes.hidden_size),
        "gate or up": (sizes.hidden_size, sizes.intermediate_size),
        "down": (sizes.intermediate_size, sizes.hidden_size),
    }
    products = {}
    for name, (before, after) in shapes.items():
        left, right = draw(tokens, before), draw(after, before) / before**0.5
        one = sustained(lambda left=left, right=right: left @ right.T, seconds, device)  # type: ignore[misc]
        products[name] = 2 * tokens * before * after / one
    kernel = choose_kernels("auto", device, dtype, sizes.head_dim).prefill
    attention = {}
    for name, causal in (("causal", True), ("unmasked", False)):
        query, key, value = (draw(1, tokens, heads, sizes.head_dim).transpose(1, 2) for heads in _heads(sizes))
        one = sustained(
            lambda q=query, k=key, v=value, c=causal: kernel(q, k, v, c, sizes.head_dim**-0.5),  # type: ignore[misc]
            seconds,
            device,
        )
        pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        attention[name] = 4 * sizes.heads * sizes.head_dim * pairs / one
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


def _heads(sizes: ModelSizes) -> tuple[int, int, int]:
    return sizes.heads, sizes.kv_heads, sizes.kv_heads


def prefill_floor(flops: RankFlops, rates: dict[str, Any]) -> float:
    """Return the seconds of a rank's prefill at the measured rates."""
    groups = (("products", PRODUCT_PARTS), ("causal", CAUSAL_PARTS), ("unmasked", UNMASKED_PARTS))
    return sum(getattr(flops, part) / rates[rate] for rate, parts in groups for part in parts)


def step_bytes(sizes: ModelSizes, cached_tokens: int, itemsize: int) -> int:
    """Return the bytes that a decode step must read: every weight but the embedding's, and keys and values."""
    cache = 2 * cached_tokens * sizes.num_layers * sizes.kv_heads * sizes.head_dim
    return itemsize * (sizes.linear_weights + sizes.hidden_size * sizes.vocab_size + cache)


def floors_of(record: dict[str, Any], rates: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each case of a benchmark's record took over its floors.

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
    if not isinstance(settings, BlockSettings):
        return count_flops(sizes, plan)
    compressor = build_compressor(settings)
    return count_flops(
        sizes,
        plan,
        score_products=lambda tokens: compressor.score_products(
            tokens, plan.anchor_query_length, sizes.heads, sizes.head_dim
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="bench.json of launch/bench.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16384, help="of a block")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--buffer-gib", type=float, default=8.0, help="what is read to measure bandwidth")
    parser.add_argument("--rates", type=Path, help="a record of this script, whose rates are taken instead")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.rates:
        record = json.loads(arguments.rates.read_text())
    else:
        rates = measure_rates(LLAMA_8B, arguments.tokens, int(arguments.buffer_gib * 2**30), arguments.seconds, device)
        record = {"what": "operations and bytes a second; times over what they alone would take", "rates": rates}
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
