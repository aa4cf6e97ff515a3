"""How far half precision with the fastest kernels is from the float32 reference, whole model, on one GPU.

    python benchmarks/numerics.py --out docs/results/numerics.json

Both have the same weights, random ones rounded to half precision, whose queries are made `--sharpen` times as long, so
that attention prefers some keys. The reference computes in float32, attention in float64. What it passes on is imposed
on the other one: a near tie may be decided otherwise, which is no error of the arithmetic. Then the other one chooses
by itself, and the record says how many of its choices are the reference's.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.compressors.base import BlockStates, Compressor
from apb_ds.compressors.window import WindowCompressor
from apb_ds.engine import APBEngine
from apb_ds.ops.selection import select_top
from apb_ds.report.record import environment, write_json

Place = tuple[int, int]  # layer, first position of the block
REFERENCE_KERNEL = "reference"


class Listening(Compressor):
    """Scores as another compressor does, and keeps the scores; or gives those that it was handed."""

    def __init__(self, imposed: dict[Place, Tensor] | None = None) -> None:
        self.imposed = imposed
        self.scores: dict[Place, Tensor] = {}

    def score(self, block: BlockStates) -> Tensor:
        place = (block.layer_idx, block.start)
        self.scores[place] = WindowCompressor().score(block)
        return self.scores[place] if self.imposed is None else self.imposed[place]


@contextmanager
def attention_outputs(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Collect what goes into each layer's output projection, (tokens, channels), float32, on the CPU."""
    found: dict[int, list[Tensor]] = defaultdict(list)

    def hook(layer_idx: int) -> Any:
        return lambda module, inputs: found[layer_idx].append(inputs[0][0].float().cpu())

    layers: Any = model.get_submodule("model.layers")
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(hook(layer_idx)) for layer_idx, layer in enumerate(layers)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def make_model(arguments: argparse.Namespace, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a Llama with random weights, the same for the same arguments, that half precision holds exactly."""
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.heads * arguments.head_dim,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        factor = arguments.sharpen if "q_proj" in name else 1.0
        parameter.data = (parameter.data * factor).to(torch.bfloat16).to(dtype)
    return model


def run(
    engine: APBEngine, compressor: Listening, document: Tensor, query: Tensor
) -> tuple[dict[int, Tensor], Tensor, Any]:
    """Prefill and ask; return each layer's attention output, the query's logits, and the plan."""
    engine.attention.compressor = compressor
    with attention_outputs(engine.module) as outputs:
        context = engine.prefill(document, query)
        logits = engine.query_logits(query, context=context).cpu()
    return {layer_idx: torch.cat(parts) for layer_idx, parts in outputs.items()}, logits, context.plan


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected, of all numbers together."""
    return float((actual - expected).norm() / expected.norm())


def shared_choices(plan: Any, ours: dict[Place, Tensor], reference: dict[Place, Tensor]) -> float:
    """Return how many of the tokens that the reference passes on are also chosen by our scores."""
    shared = total = 0
    for (layer_idx, start), scores in reference.items():
        host = next(index for index, block in enumerate(plan.blocks) if block[0] == start)
        first = scores.shape[1] - plan.num_eligible(host)
        chosen = [
            select_top(given[:, first:].cpu(), plan.kept_lengths[host]) for given in (ours[layer_idx, start], scores)
        ]
        for ours_of_head, reference_of_head in zip(*(indices.tolist() for indices in chosen), strict=True):
            shared += len(set(ours_of_head) & set(reference_of_head))
            total += len(reference_of_head)
    return shared / total


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the two; return the record."""
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(arguments.vocab_size, (1, arguments.num_tokens + arguments.query_tokens), generator=generator)
    document, query = ids.to(arguments.device).split([arguments.num_tokens, arguments.query_tokens], dim=1)
    settings: dict[str, Any] = {"hosts": arguments.hosts}

    reference = Listening()
    engine = init_inference(make_model(arguments, torch.float32), APBConfig(**settings, kernel=REFERENCE_KERNEL))
    expected, expected_logits, plan = run(engine, reference, document, query)
    assert not plan.exact
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    engine = init_inference(make_model(arguments, torch.bfloat16), APBConfig(**settings))
    actual, logits, _ = run(engine, Listening(reference.scores), document, query)
    free = Listening()
    free_outputs, free_logits, _ = run(engine, free, document, query)
    return {
        "what": "bfloat16 against the float32 reference of the same weights: norm of the difference over the norm",
        "attention_output_error": [relative_error(actual[layer], expected[layer]) for layer in sorted(expected)],
        "logits_error": relative_error(logits, expected_logits),
        "with_own_choices": {
            "attention_output_error": [
                relative_error(free_outputs[layer], expected[layer]) for layer in sorted(expected)
            ],
            "logits_error": relative_error(free_logits, expected_logits),
            "shared_choices": shared_choices(plan, free.scores, reference.scores),
        },
        "arguments": {name: value for name, value in vars(arguments).items() if name not in ("out", "device")},
        "kernels": engine.kernel_names,
        "fused": bool(engine.apb_config.fused) and engine.device.type == "cuda",
        **environment(engine.device),
    }


def main() -> None:
    """Parse the command line, compare, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=14336)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--sharpen", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    record = measure(arguments)
    print("attention output, by layer:", ", ".join(f"{error:.2%}" for error in record["attention_output_error"]))
    print(f"logits: {record['logits_error']:.2%}")
    print(f"choices shared with the reference: {record['with_own_choices']['shared_choices']:.1%}")
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
