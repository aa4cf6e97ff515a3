"""The plain transformers model, timed like the engine: a prefill, the first token of an answer, and decoding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.bench.timing import Stopwatch
from apb_ds.hf.onednn_linears import onednn_linears


def linears_of(model: PreTrainedModel, method: str, num_tokens: int) -> AbstractContextManager[Any]:
    """Install the linear layers that a plain method uses."""
    return onednn_linears(model, num_tokens) if method == "dense_onednn" else nullcontext()


@torch.no_grad()
def prefill(model: PreTrainedModel, document_ids: Tensor) -> Any:
    """Return the cache of a document, (1, n) on the model's device, after a forward that computes the last logits."""
    return model(input_ids=document_ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def answer(model: PreTrainedModel, cache: Any, query_ids: Tensor, num_new: int) -> tuple[float, float]:
    """Generate greedily after a query, (1, q); return the seconds to the first token, and of all further ones."""
    watch = Stopwatch(query_ids.device)
    token = _next(model, cache, query_ids)
    watch.mark()
    for _ in range(num_new - 1):
        token = _next(model, cache, token)
        token.item()  # as any loop that checks for an end does
    watch.mark()
    first, further = watch.laps()
    return first, further


def _next(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    """Return the likeliest next token, (1, 1)."""
    output: Any = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].argmax(dim=-1, keepdim=True)
