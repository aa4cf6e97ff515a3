"""Comparing a method with exact attention on one text: next-token distributions, and attention layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apb_ds.attention import Phase
from apb_ds.config import APBConfig
from apb_ds.engine.context import Context
from apb_ds.engine.engine import OnProgress
from apb_ds.session.active_job import ActiveJob
from apb_ds.tasks import Sample

# What the query compressor scores with: the document's last tokens, since the judged ones must stay unseen.
OBSERVERS = 64


@dataclass
class Prediction:
    """What a method makes of the judged tokens.

    Attributes
    ----------
    log_probs : (judged, vocab), float32
    outputs : each layer's attention output at the judged tokens, float32
    """

    log_probs: Tensor
    outputs: list[Tensor]


def predict_exactly(job: ActiveJob, sample: Sample, progress: OnProgress | None) -> Prediction:
    """Prefill a text's document and predict its judged tokens with exact attention, all ranks together."""
    exact = APBConfig(method="dense" if job.num_sharing == 1 else "ring")
    engine = job.make_engine(exact)
    return _predict(engine, engine.prefill(sample.document_ids, progress=progress), sample.query_ids)


def predict(job: ActiveJob, sample: Sample, progress: OnProgress | None) -> tuple[Context, Prediction]:
    """Do the same with the job's method; return its context, too."""
    document = sample.document_ids
    job.set_up(sample.query_position, document.shape[1], 0)
    observers = document[:, -OBSERVERS:] if job.engine.attention.needs_query else None
    context = job.engine.prefill(document, observers, progress=progress)
    return context, _predict(job.engine, context, sample.query_ids)


def distance(found: Prediction, expected: Prediction, judged: Tensor) -> dict[str, Any]:
    """Return how far a prediction of the judged tokens is from the exact one.

    Returns
    -------
    dict
        ``kl``: KL(exact || method) of next-token distributions, in nats, mean over the judged tokens.
        ``top1``: share of them with the same likeliest token.
        ``perplexity``, ``exact_perplexity``: of the judged tokens after the first.
        ``attention_error``: relative error of the attention output at the judged tokens, mean over the layers.
        ``attention_errors``: that of each layer, ``|method - exact| / |exact|`` (Frobenius norms).
    """
    errors = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(found.outputs, expected.outputs, strict=True)
    ]
    ours, theirs = found.log_probs, expected.log_probs
    return {
        "kl": float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean()),
        "top1": float((theirs.argmax(dim=-1) == ours.argmax(dim=-1)).float().mean()),
        "perplexity": _perplexity(ours, judged),
        "exact_perplexity": _perplexity(theirs, judged),
        "attention_error": sum(errors) / len(errors),
        "attention_errors": errors,
    }


def _predict(engine: Any, context: Context, judged: Tensor) -> Prediction:
    outputs: dict[int, Tensor] = {}

    def keep(module: Any, arguments: Any, keywords: dict[str, Any], output: Tensor) -> None:
        if keywords["phase"] is Phase.QUERY:
            outputs[keywords["layer_idx"]] = output.float()

    handle = engine.attention.register_forward_hook(keep, with_kwargs=True)
    try:
        logits = engine.query_logits(judged, context=context)[0]
    finally:
        handle.remove()
    return Prediction(logits.log_softmax(dim=-1), [outputs[layer] for layer in sorted(outputs)])


def _perplexity(log_probs: Tensor, judged: Tensor) -> float | None:
    """Return the perplexity of the judged tokens after the first; None if there is only one."""
    if judged.shape[1] < 2:
        return None
    targets = judged[0, 1:].unsqueeze(-1).to(log_probs.device)
    return float(torch.exp(-log_probs[:-1].gather(-1, targets).mean()))
