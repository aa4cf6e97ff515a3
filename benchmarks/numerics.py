"""The error of half precision with the fastest kernels against the float32 reference, for a whole model on one GPU.

    python benchmarks/numerics.py --out docs/results/numerics.json

Both have the same random weights, rounded to half precision; queries are made `--sharpen` times as long, so that
attention prefers some keys. The reference computes in float32, its attention in float64. Its choice of passed tokens is
imposed on half precision: deciding a near tie otherwise is not an arithmetic error. Measured are

    attention_alone        the reference gets half precision's own queries, keys and values: the error of our attention,
                           by layer
    per_layer              each layer gets the reference's hidden states: adds projections in half precision
    end_to_end             each layer gets the output of the layers before it: adds their errors
    with_own_choices       as end_to_end, with passed tokens chosen in half precision
    plain_model            transformers' dense model in half precision against itself in float32, end to end: what any
                           model in that precision accumulates
    plain_model_per_layer  the same, each layer given its float32 hidden states

as relative errors of attention (the input of the output projection) and of the query's logits. The document does not
need the last layer's attention: that layer's error is of the query's tokens alone.
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
from benchmarks import common
from benchmarks.shadow import shadowed

BlockKey = tuple[int, int]  # layer, first position of the block
Hidden = dict[int, list[Tensor]]  # by layer its inputs, (1, tokens, channels), one for each forward, in order
REFERENCE_KERNEL = "reference"
MEASUREMENTS = ("per_layer", "end_to_end", "with_own_choices", "plain_model", "plain_model_per_layer")


class RecordingCompressor(Compressor):
    """Scores as ``window`` does and keeps the scores, but returns those that are `imposed`, if any."""

    def __init__(self, imposed: dict[BlockKey, Tensor] | None = None) -> None:
        self.imposed = imposed
        self.scores: dict[BlockKey, Tensor] = {}

    def score(self, block: BlockStates) -> Tensor:
        key = (block.layer_idx, block.start)
        self.scores[key] = WindowCompressor().score(block)
        return (self.scores if self.imposed is None else self.imposed)[key]


@dataclass(frozen=True)
class Outputs:
    """What one run of a model gave, on the CPU, in float32.

    Attributes
    ----------
    attention : by layer the input of its output projection, (tokens, channels): in APB for the anchor's tokens, those
        of the blocks and those of the query; in the last layer for the query's alone
    logits : (1, query_tokens, vocab)
    hidden : the layers' inputs
    """

    attention: dict[int, Tensor]
    logits: Tensor
    hidden: Hidden


@contextmanager
def hooked(modules: Iterable[nn.Module], visit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``visit(index, first_input)`` before each module; a tensor that it returns replaces the input."""

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
    """Run a model, and collect the inputs of its layers and output projections.

    Parameters
    ----------
    compute_logits : runs the model, in any number of forwards, and returns the query's logits
    imposed : inputs of each layer, from another run with the same forwards, to replace its own

    Raises
    ------
    ValueError
        If the forwards differ from those of the other run.
    """
    attention: Hidden = defaultdict(list)
    hidden: Hidden = defaultdict(list)

    def before_layer(layer_idx: int, states: Tensor) -> Tensor | None:
        forward = len(hidden[layer_idx])
        hidden[layer_idx].append(states.float().cpu())
        if imposed is None:
            return None
        expected = imposed[layer_idx][forward].shape if forward < len(imposed[layer_idx]) else None
        if states.shape != expected:
            raise ValueError(
                f"layer {layer_idx}, forward {forward}: {tuple(states.shape)} here, {expected} in the other run"
            )
        return imposed[layer_idx][forward].to(states)

    layers: Any = model.get_submodule("model.layers")
    projections = [layer.self_attn.o_proj for layer in layers]
    with (
        hooked(layers, before_layer),
        hooked(projections, lambda layer_idx, states: attention[layer_idx].append(states[0].float().cpu())),
    ):
        logits = compute_logits().float().cpu()
    return Outputs({layer_idx: torch.cat(parts) for layer_idx, parts in sorted(attention.items())}, logits, hidden)


def make_model(arguments: argparse.Namespace, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a Llama in `dtype`, with random weights that half precision holds exactly; fixed by the arguments."""
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
        parameter.data = (parameter.data * factor).to(getattr(torch, arguments.dtype)).to(dtype)
    return model.eval()


def run(
    engine: APBEngine, compressor: RecordingCompressor, document: Tensor, query: Tensor, imposed: Hidden | None = None
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
    """Feed document and query, (1, tokens), to a plain transformers model in one forward; see `watch`."""

    def compute_logits() -> Tensor:
        output: Any = model(input_ids=ids, use_cache=False, logits_to_keep=query_tokens)
        return output.logits

    outputs = watch(model, compute_logits, imposed)
    last = max(outputs.attention)
    outputs.attention[last] = outputs.attention[last][-query_tokens:]  # as APB, which computes no other tokens there
    return outputs


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    return float((actual - expected).norm() / expected.norm())


def errors(actual: Outputs, expected: Outputs) -> dict[str, Any]:
    """Return the relative errors of each layer's attention and of the logits."""
    by_layer = [relative_error(actual.attention[index], attention) for index, attention in expected.attention.items()]
    return {"attention_output_error": by_layer, "logits_error": relative_error(actual.logits, expected.logits)}


def shared_choices(plan: Plan, ours: dict[BlockKey, Tensor], reference: dict[BlockKey, Tensor]) -> float:
    """Return the share of the tokens passed on by the reference that our scores choose, too."""
    shared = total = 0
    for key, scores in reference.items():
        host = next(index for index, block in enumerate(plan.blocks) if block[0] == key[1])
        eligible, count = plan.num_eligible(host), plan.kept_lengths[host]
        mask = torch.zeros(2, scores.shape[0], eligible, dtype=torch.bool)
        for row, given in zip(mask, (ours[key], scores), strict=True):
            row.scatter_(1, select_top(given[:, -eligible:].cpu(), count), True)
        shared += int(mask.all(dim=0).sum())
        total += int(mask[1].sum())
    return shared / total


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare half precision with the reference, and the plain model with itself; return the record."""
    num_query = arguments.query_tokens
    document, query = common.random_request(
        arguments.num_tokens, num_query, arguments.device, vocab_size=arguments.vocab_size, seed=arguments.seed
    )
    ids = torch.cat((document, query), dim=1)

    model = make_model(arguments, torch.float32)
    plain_expected = run_plain(model, ids, num_query)
    engine = init_inference(model, APBConfig(hosts=arguments.hosts, kernel=REFERENCE_KERNEL))
    reference = RecordingCompressor()
    expected, plan = run(engine, reference, document, query)
    assert not plan.exact
    del model, engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    model = make_model(arguments, getattr(torch, arguments.dtype))
    plain = run_plain(model, ids, num_query)
    plain_per_layer = run_plain(model, ids, num_query, plain_expected.hidden)
    engine = init_inference(model, APBConfig(hosts=arguments.hosts))
    imposed, own = RecordingCompressor(reference.scores), RecordingCompressor()
    with shadowed(engine, RecordingCompressor(reference.scores), REFERENCE_KERNEL) as shadow:
        per_layer, _ = run(engine, imposed, document, query, expected.hidden)
    end_to_end, _ = run(engine, imposed, document, query)
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
        "arguments": common.given(arguments, "device"),
        "kernels": engine.kernel_names,
        "fused": engine.apb_config.settings.fused and engine.device.type == "cuda",
        **environment(engine.device),
    }


def summary(record: dict[str, Any]) -> str:
    """Return one line for each measurement."""
    lines = []
    for name in ("attention_alone", *MEASUREMENTS):
        measured = record[name]
        line = f"{name:<22} attention by layer {', '.join(f'{e:.2%}' for e in measured['attention_output_error'])}"
        line += f"; logits {measured['logits_error']:.2%}" if "logits_error" in measured else ""
        line += f"; choices shared {measured['shared_choices']:.1%}" if "shared_choices" in measured else ""
        lines.append(line)
    return "\n".join(lines)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default this process's."""
    parser = common.make_parser(__doc__)
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
    return parser.parse_args(given)


def main() -> None:
    """Measure; print and write the record."""
    arguments = parse_arguments()
    record = measure(arguments)
    print(summary(record))
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
