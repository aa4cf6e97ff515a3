"""A decode step of one emulated rank, whose weights are sharded, against the time to read what it holds.

    python benchmarks/emulated_step.py --out outputs/emulated_step.json

Random weights of Llama-3.3-70B's sizes. The rank's shard, cache and kernels are real. What other ranks would send is
copied from its own part and crosses no link, so this times what one rank computes, not several ranks together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.bench.sequences import PLAIN_GREEDY, random_queries
from apb_ds.bench.timing import Stopwatch, spread
from apb_ds.loading import ModelConfig, load_model
from apb_ds.parallel.emulated import EmulatedGroup
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.record import environment, write_json
from benchmarks import common

LLAMA_70B = Path(__file__).resolve().parents[1] / "configs" / "model" / "llama33_70b.yaml"


def reading_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Return the bytes per second at which memory is read."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(10):
        watch = Stopwatch(device)
        data.sum()
        watch.mark()
        best = min(best, *watch.laps())
    return num_bytes / best


def main(given: list[str] | None = None) -> None:
    """Measure, print, and write the record."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--num-layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--num-tokens", type=int, default=130944)
    parser.add_argument("--num-new", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args(given)
    values = yaml.safe_load(LLAMA_70B.read_text(encoding="utf-8"))
    if arguments.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        values["geometry"] |= sizes | {"head_dim": 16, "vocab_size": 512, "num_hidden_layers": 2}
    settings = {"load_format": "dummy", "path": None, "num_layers": arguments.num_layers, "shard_weights": True}
    group = EmulatedGroup(world_size=arguments.ranks, copies=True)
    loaded = load_model(ModelConfig.from_dict(values | settings), group=group)
    engine = init_inference(loaded.model, APBConfig(hosts=arguments.ranks), group=group, shard_weights=True)
    vocab_size = loaded.model.config.vocab_size
    (document,), (query,) = (random_queries(1, length, vocab_size, 0) for length in (arguments.num_tokens, 32))
    document, query = document.to(loaded.device), query.to(loaded.device)
    prefill_s, ms_per_token = [], []
    for _ in range(arguments.repeats + 1):
        reset_peak_memory(loaded.device)
        context = None  # first: the next one takes its memory
        context = engine.prefill(document, max_positions=document.shape[1] + 32 + arguments.num_new)
        prefill_s.append(context.prefill_s)
    assert context is not None
    for _ in range(arguments.repeats + 1):  # the first one records the step
        engine.generate(query_ids=query, context=context, max_new_tokens=arguments.num_new, **PLAIN_GREEDY)
        ms_per_token.append(engine.stats.decode_s / (arguments.num_new - 1) * 1000)
    embedding = loaded.model.get_input_embeddings()
    read = sum(one.numel() * one.element_size() for one in {*loaded.model.parameters()} - {*embedding.parameters()})
    cached = engine.pool.document_bytes(context.plan.shard_length(0))
    bandwidth = reading_bandwidth(loaded.device, 2**26 if arguments.tiny else 2**33)
    record: dict[str, Any] = {key: value for key, value in vars(arguments).items() if key != "out"}
    record |= {
        "layers": loaded.model.config.num_hidden_layers,
        "prefill": spread(prefill_s[1:], "s"),
        "decode": spread(ms_per_token[1:], "ms_per_token"),
        "held_bytes": read + sum(one.numel() * one.element_size() for one in embedding.parameters()),
        "read_bytes": {"weights": read, "cache": cached},
        "bytes_per_s": bandwidth,
        "floor_ms": (read + cached) / bandwidth * 1000,
        "peak_memory_bytes": peak_memory_bytes(loaded.device),
        **environment(loaded.device),
    }
    print({key: record[key] for key in ("prefill", "decode", "floor_ms", "read_bytes")}, flush=True)
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
