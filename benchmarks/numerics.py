"""How far half precision with the fastest kernels is from the float32 reference, whole model, on one GPU.

    python benchmarks/numerics.py --out docs/results/numerics.json

Both have the same weights, random ones rounded to half precision, whose queries are made `--sharpen` times as long, so
that attention prefers some keys. The reference computes in float32, attention in float64. What it passes on is imposed
on the other one: a near tie may be decided otherwise, which is no error of the arithmetic. What is measured:

    attention_alone        the reference is given the very queries, keys and values of half precision: the error of our
                           attention's arithmetic, by layer
    per_layer              each layer is given the reference's hidden states: projections in half precision come in
    end_to_end             each layer is given what the layers before it made: their errors come in, too
    with_own_choices       as end_to_end, but what is passed on is chosen in half precision
    plain_model            transformers' own dense model in half precision against itself in float32, end to end: what
                           any model in that precision adds up, whoever computes it
    plain_model_per_layer  the same, each layer given what it has in float32

Errors are those of attention (what goes into the output projection) and of the query's logits. Nothing needs the last
layer's attention for the document: the error there is that of the query's tokens alone.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.compressors.base import BlockStates, Compressor
from apb_ds.compressors.window import WindowCompressor
from apb_ds.engine.engine import APBEngine
from apb_ds.ops.selection import select_top
from apb_ds.plan import Plan
from apb_ds.report.record import environment, write_json
from benchmarks.shadow import shadowed

Place = tuple[int, int]  # layer, first position of the block
Hidden = dict[int, list[Tensor]]  # layer: what it was given, (1, tokens, channels), one for each forward, in order
REFERENCE_KERNEL = "reference"
MEASUREMENTS = ("per_layer", "end_to_end", "with_own_choices", "plain_model", "plain_model_per_layer")


class Listening(Compressor):
    """Scores as another compressor does, and keeps the scores; or gives those that it was handed."""

    def __init__(self, imposed: dict[Place, Tensor] | None = None) -> None:
        self.imposed = imposed
        self.scores: dict[Place, Tensor] = {}

    def score(self, block: BlockStates) -> Tensor:
        place = (block.layer_idx, block.start)
        self.scores[place] = WindowCompressor().score(block)
        return self.scores[place] if self.imposed is None else self.imposed[place]


@dataclass(frozen=True)
class Outputs:
    """What one run gave, on the CPU.

    Attributes
    ----------
    attention : for each layer what went into its output projection, (tokens, channels), float32: in APB the anchor's
        tokens, those of the blocks and those of the query, in the last layer the query's alone
    logits : (1, query_tokens, vocab), float32
    hidden : what each layer was given, float32
    """

    attention: dict[int, Tensor]
    logits: Tensor
    hidden: Hidden


@contextmanager
def hooked(modules: Iterable[nn.Module], visit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``visit(index, given)`` before each module, with its first input; what it returns, if any, is the input."""

    def hook(index: int) -> Any:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            instead = visit(index, inputs[0])
            return None if instead is None else (instead, *inputs[1:])

        return before

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(hook(index)).remove)
        yield


def watch(model: nn.Module, compute_logits: Callable[[], Tensor], imposed: Hidden | None = None) -> Outputs:
    """Run a model and collect what its layers were given and gave.

    Parameters
    ----------
    compute_logits : runs the model, in as many forwards as it takes, and returns the query's logits
    imposed : from another run with the same forwards: what each layer is given, rounded to the model's dtype, instead
        of what the layers before it made

    Raises
    ------
    ValueError
        If the forwards are not those of the other run.
    """
    attention: Hidden = defaultdict(list)
    hidden: Hidden = defaultdict(list)

    def before_layer(layer_idx: int, given: Tensor) -> Tensor | None:
        found = hidden[layer_idx]
        found.append(given.float().cpu())
        if imposed is None:
            return None
        place = len(found) - 1
        expected = imposed[layer_idx][place].shape if place < len(imposed[layer_idx]) else None
        if given.shape != expected:
            raise ValueError(
                f"layer {layer_idx}, forward {place}: {tuple(given.shape)} here, {expected} in the other run"
            )
        return imposed[layer_idx][place].to(given)

    layers: Any = model.get_submodule("model.layers")
    projections = [layer.self_attn.o_proj for layer in layers]
    with (
        hooked(layers, before_layer),
        hooked(projections, lambda layer_idx, given: attention[layer_idx].append(given[0].float().cpu())),
    ):
        logits = compute_logits().float().cpu()
    return Outputs({layer_idx: torch.cat(parts) for layer_idx, parts in sorted(attention.items())}, logits, hidden)


def make_model(arguments: argparse.Namespace, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a Llama with random weights in `dtype`, the same for the same arguments, that half precision holds."""
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
    model.set_attn_implementation("sdpa")
    for name, parameter in model.named_parameters():
        factor = arguments.sharpen if "q_proj" in name else 1.0
        parameter.data = (parameter.data * factor).to(half_dtype(arguments)).to(dtype)
    return model.eval()


def half_dtype(arguments: argparse.Namespace) -> torch.dtype:
    """Return the dtype that is compared with the reference."""
    dtype = getattr(torch, arguments.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def free_memory() -> None:
    """Give back the memory of a model that was deleted."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(
    engine: APBEngine, compressor: Listening, document: Tensor, query: Tensor, imposed: Hidden | None = None
) -> tuple[Outputs, Plan]:
    """Prefill a document, (1, tokens), and ask a query, (1, query_tokens); see `watch`."""
    engine.attention.compressor = compressor
    plans: list[Plan] = []

    def compute_logits() -> Tensor:
        context = engine.prefill(document, query)
        plans.append(context.plan)
        return engine.query_logits(query, context=context)

    return watch(engine.module, compute_logits, imposed), plans[0]


@torch.no_grad()
def run_plain(model: LlamaForCausalLM, ids: Tensor, query_tokens: int, imposed: Hidden | None = None) -> Outputs:
    """Feed document and query, (1, tokens), to a model as transformers made it, in one forward; see `watch`."""

    def compute_logits() -> Tensor:
        output: Any = model(input_ids=ids, use_cache=False, logits_to_keep=query_tokens)
        return output.logits

    outputs = watch(model, compute_logits, imposed)
    last = max(outputs.attention)
    outputs.attention[last] = outputs.attention[last][-query_tokens:]  # the tokens that there are of APB
    return outputs


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected, of all numbers together."""
    return float((actual - expected).norm() / expected.norm())


def errors(actual: Outputs, expected: Outputs) -> dict[str, Any]:
    """Return the relative errors of each layer's attention and of the logits."""
    return {
        "attention_output_error": [
            relative_error(actual.attention[layer_idx], attention)
            for layer_idx, attention in expected.attention.items()
        ],
        "logits_error": relative_error(actual.logits, expected.logits),
    }


def shared_choices(plan: Plan, ours: dict[Place, Tensor], reference: dict[Place, Tensor]) -> float:
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
    """Compare half precision with the reference, and the plain model with itself; return the record."""
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(arguments.vocab_size, (1, arguments.num_tokens + arguments.query_tokens), generator=generator)
    ids = ids.to(arguments.device)
    document, query = ids.split([arguments.num_tokens, arguments.query_tokens], dim=1)
    settings: dict[str, Any] = {"hosts": arguments.hosts}

    model = make_model(arguments, torch.float32)
    plain_expected = run_plain(model, ids, arguments.query_tokens)
    engine = init_inference(model, APBConfig(**settings, kernel=REFERENCE_KERNEL))
    reference = Listening()
    expected, plan = run(engine, reference, document, query)
    assert not plan.exact
    del model, engine
    free_memory()

    model = make_model(arguments, half_dtype(arguments))
    plain = run_plain(model, ids, arguments.query_tokens)
    plain_per_layer = run_plain(model, ids, arguments.query_tokens, plain_expected.hidden)
    engine = init_inference(model, APBConfig(**settings))
    with shadowed(engine, Listening(reference.scores), REFERENCE_KERNEL) as shadow:
        per_layer, _ = run(engine, Listening(reference.scores), document, query, expected.hidden)
    end_to_end, _ = run(engine, Listening(reference.scores), document, query)
    own = Listening()
    with_own_choices, _ = run(engine, own, document, query)
    return {
        "what": f"{arguments.dtype} against float32, the same weights: norm of the difference over the norm; the "
        "measurements are explained at the top of benchmarks/numerics.py",
        "attention_alone": {"attention_output_error": shadow.errors()},
        "per_layer": errors(per_layer, expected),
        "end_to_end": errors(end_to_end, expected),
        "with_own_choices": {
            **errors(with_own_choices, expected),
            "shared_choices": shared_choices(plan, own.scores, reference.scores),
        },
        "plain_model": errors(plain, plain_expected),
        "plain_model_per_layer": errors(plain_per_layer, plain_expected),
        "arguments": {name: value for name, value in vars(arguments).items() if name not in ("out", "device")},
        "kernels": engine.kernel_names,
        "fused": engine.apb_config.settings.fused and engine.device.type == "cuda",
        **environment(engine.device),
    }


def summary(record: dict[str, Any]) -> str:
    """Return one line for each measurement."""
    alone = ", ".join(f"{error:.2%}" for error in record["attention_alone"]["attention_output_error"])
    lines = [f"{'attention_alone':<22} attention by layer {alone}"]
    for name in MEASUREMENTS:
        measured = record[name]
        attention = ", ".join(f"{error:.2%}" for error in measured["attention_output_error"])
        shared = f"; choices shared {measured['shared_choices']:.1%}" if "shared_choices" in measured else ""
        lines.append(f"{name:<22} attention by layer {attention}; logits {measured['logits_error']:.2%}{shared}")
    return "\n".join(lines)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says, by default this process's."""
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
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(given)


def main() -> None:
    """Compare as the command line says; print and write the record."""
    arguments = parse_arguments()
    record = measure(arguments)
    print(summary(record))
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
