"""Comparing a method with exact attention on one text: next-token distributions, and attention layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apb_ds.attention import Phase
from apb_ds.config import APBConfig
from apb_ds.engine.context import Context
from apb_ds.session.active_job import ActiveJob
from apb_ds.tasks import Sample

# What the query compressor scores with: the document's last tokens, since the judged ones must stay unseen.
OBSERVERS = 64


def compare_with_exact(job: ActiveJob, sample: Sample) -> tuple[Context, dict[str, Any]]:
    """Return the method's context and its distance from exact attention. All ranks call this together.

    Returns
    -------
    Context
    dict
        ``kl``: KL(exact || method) of next-token distributions, in nats, mean over the judged tokens.
        ``top1``: share of them with the same likeliest token.
        ``perplexity``, ``exact_perplexity``: of the judged tokens after the first.
        ``attention_error``: relative error of the attention output at the judged tokens, mean over the layers.
        ``attention_errors``: that of each layer, ``|method - exact| / |exact|`` (Frobenius norms).
    """
    document, judged = sample.document_ids, sample.query_ids
    exact = APBConfig(method="dense" if job.group.world_size == 1 else "ring")
    engine = job.make_engine(exact)
    expected, expected_outputs = _predict(engine, engine.prefill(document), judged)

    job.set_up(sample.query_position, document.shape[1], 0)
    observers = document[:, -OBSERVERS:] if job.engine.attention.needs_query else None
    context = job.engine.prefill(document, observers)
    found, found_outputs = _predict(job.engine, context, judged)

    errors = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(found_outputs, expected_outputs, strict=True)
    ]
    return context, {
        "kl": float((expected.exp() * (expected - found)).sum(dim=-1).mean()),
        "top1": float((expected.argmax(dim=-1) == found.argmax(dim=-1)).float().mean()),
        "perplexity": _perplexity(found, judged),
        "exact_perplexity": _perplexity(expected, judged),
        "attention_error": sum(errors) / len(errors),
        "attention_errors": errors,
    }


def _predict(engine: Any, context: Context, judged: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return log-probabilities, (judged, vocab), and each layer's attention output, in float32."""
    outputs: dict[int, Tensor] = {}

    def keep(module: Any, arguments: Any, keywords: dict[str, Any], output: Tensor) -> None:
        if keywords["phase"] is Phase.QUERY:
            outputs[keywords["layer_idx"]] = output.float()

    handle = engine.attention.register_forward_hook(keep, with_kwargs=True)
    try:
        logits = engine.query_logits(judged, context=context)[0]
    finally:
        handle.remove()
    return logits.log_softmax(dim=-1), [outputs[layer] for layer in sorted(outputs)]


def _perplexity(log_probs: Tensor, judged: Tensor) -> float | None:
    """Return the perplexity of the judged tokens after the first; None if there is only one."""
    if judged.shape[1] < 2:
        return None
    targets = judged[0, 1:].unsqueeze(-1).to(log_probs.device)
    return float(torch.exp(-log_probs[:-1].gather(-1, targets).mean()))
