"""Weights whole on every rank, and sharded over the ranks: memory while loading, bytes held, prefill and decoding.

    deepspeed --num_accelerators 2 benchmarks/shards.py --out outputs/shards.json

Writes a checkpoint of random weights first, unless ``--model`` names one. Memory is what a process has for itself
(``anonymous``), and that with the pages of files that it has mapped (``resident``), which all processes of a machine
share, and which the system can take back.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import apb_ds
from apb_ds.loading import ModelConfig, load_model
from apb_ds.parallel.groups import SequenceGroup, world_group
from apb_ds.report.record import environment, write_json
from apb_ds.serving.host_memory import return_freed_memory
from apb_ds.session.model_in_use import free_memory
from benchmarks import common
from benchmarks.serving import save_tokenizer

SAMPLED_S = 0.002


def memory() -> dict[str, int]:
    """Return the bytes that this process has for itself, and with mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name
    }
    return {"anonymous": sizes["RssAnon"], "resident": sizes["RssAnon"] + sizes["RssFile"] + sizes["RssShmem"]}


@contextmanager
def peak_of_memory(found: dict[str, Any]) -> Iterator[None]:
    """Put into ``found`` by how much this process's memory grew at most, and what stays."""
    free_memory()
    return_freed_memory()
    before = memory()
    ends, most = threading.Event(), dict(before)

    def sample() -> None:
        while not ends.wait(SAMPLED_S):
            for name, size in memory().items():
                most[name] = max(most[name], size)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield
    finally:
        ends.set()
        sampler.join()
    free_memory()
    return_freed_memory()
    after = memory()
    found["load_peak_bytes"] = {name: size - before[name] for name, size in most.items()}
    found["load_bytes"] = {name: size - before[name] for name, size in after.items()}


def save_model(folder: Path, arguments: Any) -> None:
    """Write a Llama of random weights, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = arguments.hidden
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2**17,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    save_tokenizer(folder, arguments.vocab_size)


def measure(path: str, group: SequenceGroup, arguments: Any, shard_weights: bool) -> dict[str, Any]:
    """Load a model, prefill and decode; return what it took on this rank."""
    found: dict[str, Any] = {"shard_weights": shard_weights}
    config = ModelConfig(path=path, dtype="bfloat16", shard_weights=shard_weights)
    with peak_of_memory(found):
        began = time.perf_counter()
        model = load_model(config, group=group).model
        found["load_s"] = time.perf_counter() - began
    engine = apb_ds.init_inference(model, {"hosts": 2 * group.world_size}, group=group, shard_weights=shard_weights)
    found["weight_bytes"] = sum(one.numel() * one.element_size() for one in {*model.parameters()})
    generator = torch.Generator().manual_seed(0)
    document, query = (
        torch.randint(arguments.vocab_size, (1, length), generator=generator).to(engine.device)
        for length in (arguments.num_tokens, 32)
    )
    prefill_s, ms_per_token = [], []
    for _ in range(arguments.repeats + 1):
        context = engine.prefill(document)
        answer = engine.generate(
            query_ids=query, context=context, max_new_tokens=arguments.num_new, do_sample=False, eos_token_id=None
        )
        prefill_s.append(context.prefill_s)
        ms_per_token.append(engine.stats.decode_s / (arguments.num_new - 1) * 1000)
    sent = 0 if engine.weights is None else engine.weights.num_gathered_bytes
    found |= {
        "prefill_s": prefill_s[1:],
        "ms_per_token": ms_per_token[1:],
        "gathered_bytes_a_prefill": sent // (arguments.repeats + 1),
        "rounds": len(context.plan.rounds),
        "answer": answer[0].tolist(),
    }
    engine.destroy()
    return found


def main(given: list[str] | None = None) -> None:
    """Measure both, and write the record on the first rank."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", help="folder of a model; by default one is made")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--num-tokens", type=int, default=2048)
    parser.add_argument("--num-new", type=int, default=17)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    arguments = parser.parse_args(given)
    group = world_group()
    with tempfile.TemporaryDirectory() as folder:
        path = group.gather_objects(arguments.model or folder)[0]
        if group.is_first and arguments.model is None:
            save_model(Path(path), arguments)
        group.barrier()
        runs = [group.gather_objects(measure(path, group, arguments, shards)) for shards in (False, True)]
        group.barrier()
    if group.is_first:
        same = runs[0][0].pop("answer") == runs[1][0].pop("answer")
        for of_rank in [*runs[0][1:], *runs[1][1:]]:
            of_rank.pop("answer")
        settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "local_rank")}
        record = {**settings, "ranks": group.world_size, "same_answers": same, "whole": runs[0], "sharded": runs[1]}
        write_json(arguments.out, record | environment(torch.device("cpu")))
        for run in runs:
            print(run[0], flush=True)


if __name__ == "__main__":
    main()
