"""How far APB's predictions are from the dense model's: KL(dense || APB) over long texts, for each compressor.

    python benchmarks/fidelity.py --out kl.json [--ratio 16] [--heads heads.pt] [text files]

Texts are those of ``task=fidelity``: the first ``--num-tokens`` tokens of each are the document, and the ``--judged``
tokens after them the query, whose next-token distributions are compared. The judged tokens are never in the anchor: the
document is prefilled without a query. Only for the ``query`` compressor the document's last 64 tokens stand in the
anchor, as its observers. This sweep computes the dense predictions once per text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.compressors.base import RETAINING_HEADS
from apb_ds.config import DEFAULT_COMPRESSION_RATIO, check_choice
from apb_ds.engine.engine import APBEngine
from apb_ds.loading import ModelConfig, load_model
from apb_ds.report.flops import SIZE_NAMES
from apb_ds.report.record import environment, write_json
from benchmarks import common

Settings = dict[str, Any]


def settings_to_compare(hosts: int, ratio: float | None = None, with_heads: bool = False) -> dict[str, list[Settings]]:
    """Return the rows of the table: a name, and the settings whose mean it shows (several seeds of ``random``).

    Parameters
    ----------
    ratio : compression ratio of the rows that pass something on; None leaves it to the package
    with_heads : whether there are retaining heads to compare
    """
    base: Settings = {"hosts": hosts}
    passing = base if ratio is None else base | {"compression_ratio": ratio}
    names = (*common.UNTRAINED, *(common.WITH_HEADS if with_heads else ()))
    return {
        "local block only": [base | {"anchor_length": 0, "passing_length": 0}],
        "anchor only": [base | {"passing_length": 0}],
        "star": [base | {"method": "star"}],
        **{name: [passing | {"compressor": name}] for name in names},
        "random": [passing | {"compressor": "random", "seed": seed} for seed in range(common.SEEDS)],
    }


@torch.no_grad()
def with_windows(model: Any, window: int) -> Any:
    """Return a Llama model's weights in one whose every other layer attends within a window, the first one included."""
    kept = [*SIZE_NAMES, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters"]
    kept.append("tie_word_embeddings")
    kinds = ["sliding_attention", "full_attention"] * model.config.num_hidden_layers
    config = Qwen2Config(
        **{name: getattr(model.config, name) for name in kept},
        use_sliding_window=True,
        sliding_window=window,
        layer_types=kinds[: model.config.num_hidden_layers],
    )
    hybrid = Qwen2ForCausalLM(config).to(model.device, model.dtype).eval().requires_grad_(False)
    missing, unexpected = hybrid.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("bias") for name in missing)
    for name in missing:
        hybrid.get_parameter(name).zero_()
    return hybrid


@torch.no_grad()
def dense_log_probs(model: Any, ids: Tensor, judged: int) -> Tensor:
    """Return the plain model's log-probabilities at the last `judged` tokens, (judged, vocab), float32."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=judged).logits[0]
    return logits.float().log_softmax(dim=-1)


def divergence(engine: APBEngine, settings: Settings, document: Tensor, judged: Tensor, dense: Tensor) -> float:
    """Return KL(dense || APB), mean over the judged tokens, in nats."""
    engine.configure(APBConfig(**settings))
    observers = document[:, -common.OBSERVERS :] if settings.get("compressor") == "query" else None
    context = engine.prefill(document, observers)
    assert not context.plan.exact
    ours = engine.query_logits(judged, context=context)[0].log_softmax(dim=-1)
    return float((dense.exp() * (dense - ours)).sum(dim=-1).mean())


def differences(means: dict[str, list[float]], to: str) -> dict[str, dict[str, Any]] | None:
    """Return each row's mean difference to the row `to`, with its interval; None if that row was not measured.

    Parameters
    ----------
    means : of each row one number per text
    """
    if to not in means:
        return None
    return {name: common.mean_difference(values, means[to]) for name, values in means.items()}


def spread_of_seeds(by_text: dict[str, list[float]]) -> dict[str, Any]:
    """Return each seed's mean over texts, and the spread of these means: no smaller difference counts.

    Parameters
    ----------
    by_text : of each text one number per seed
    """
    means = [fmean(of_seed) for of_seed in zip(*by_text.values(), strict=True)]
    return {"mean_by_seed": means, "standard_deviation": stdev(means), "min": min(means), "max": max(means)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows on all texts; return the record."""
    loaded = load_model(ModelConfig(path=arguments.model, dtype=arguments.dtype))
    samples, sources = common.read_texts(arguments, loaded)
    model, heads = loaded.model, arguments.heads
    if arguments.sliding_window is not None:
        model = with_windows(model, arguments.sliding_window)
    # An engine keeps the heads it was once given, whatever it is configured with later.
    config = APBConfig() if heads is None else APBConfig(compressor=RETAINING_HEADS)
    engine = init_inference(model, config, retaining_heads=None if heads is None else str(heads))
    rows = settings_to_compare(arguments.hosts, arguments.ratio, heads is not None)
    rows = {name: rows[name] for name in rows if not arguments.rows or name in arguments.rows}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    for sample in samples:
        document, judged = sample.document_ids.to(loaded.device), sample.query_ids.to(loaded.device)
        dense = dense_log_probs(model, torch.cat((document, judged), dim=1), judged.shape[1])
        text = sample.labels["text"]
        for name, variants in rows.items():
            found[name][text] = [divergence(engine, values, document, judged, dense) for values in variants]
        print(f"{text}: {', '.join(f'{name} {fmean(found[name][text]):.4f}' for name in rows)}", flush=True)
    means = {name: [fmean(values) for values in by_text.values()] for name, by_text in found.items()}
    return {
        "what": "KL(dense || method) of next-token distributions, nats, mean over judged tokens; minus_random and "
        "minus_window are differences to that row (random: to the mean over its seeds), text by text, with their 95% "
        "bootstrap interval over texts",
        "texts": sources,
        "document_tokens": arguments.num_tokens,
        "judged_tokens": arguments.judged,
        "hosts": arguments.hosts,
        "ratio": DEFAULT_COMPRESSION_RATIO if arguments.ratio is None else arguments.ratio,
        "heads": common.describe_heads(heads),
        "sliding_window": arguments.sliding_window,
        "kl": found,
        "mean_kl": {name: fmean(values) for name, values in means.items()},
        "minus_random": differences(means, "random"),
        "minus_window": differences(means, "window"),
        "random_seeds": spread_of_seeds(found["random"]) if "random" in found else None,
        "settings": rows,
        "model": Path(arguments.model).name,
        "dtype": str(loaded.dtype),
        "kernels": engine.kernel_names,
        **environment(loaded.device),
    }


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default this process's."""
    parser = common.make_parser(__doc__)
    common.add_text_arguments(parser)
    parser.add_argument("--ratio", type=float, help="compression ratio; by default the package's")
    parser.add_argument(
        "--sliding-window", type=int, metavar="TOKENS", help="have every other layer attend within so many tokens"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows; give them after the texts")
    arguments = parser.parse_args(given)
    common.check_arguments(parser, arguments)
    for row in arguments.rows or ():
        try:
            check_choice("--rows", row, settings_to_compare(1, with_heads=arguments.heads is not None))
        except ValueError as error:
            parser.error(str(error))
    return arguments


def main() -> None:
    """Measure; print the means and write the record."""
    arguments = parse_arguments()
    record = measure(arguments)
    for name, value in sorted(record["mean_kl"].items(), key=lambda item: item[1]):
        shown = f"{name:18s} {value:.4f}"
        if record["minus_random"]:
            low, high = record["minus_random"][name]["interval_95"]
            shown += f"   minus random: [{low:+.4f}, {high:+.4f}]"
        print(shown)
    if seeds := record["random_seeds"]:
        spread = f"{seeds['min']:.4f} to {seeds['max']:.4f}, sd {seeds['standard_deviation']:.4f}"
        print(f"{common.SEEDS} seeds of random: {spread}")
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
