"""The obvious, slow kernel: float64, the full matrix of logits. Tests compare every other kernel with it."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.ops.kernels.base import Kernel, expand_kv_heads
from apb_ds.ops.kernels.pieces import Logits


class ReferenceKernel(Kernel):
    """Softmax attention in float64 on any device. Memory grows with queries x keys."""

    name = "reference"
    has_window = True
    has_softcap = True

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        heads = query.shape[1]
        keys, values = (expand_kv_heads(states.double(), heads) for states in (key, value))
        scores = query.double() @ keys.transpose(-1, -2) * logits.scale
        if logits.softcap is not None:
            scores = logits.softcap * torch.tanh(scores / logits.softcap)
        if logits.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            offset = seen.shape[1] - seen.shape[0]  # the queries are the last tokens
            seen = seen.tril(offset)
            if logits.window is not None:
                seen = seen.triu(offset - logits.window + 1)
            scores = scores.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        output = torch.exp(scores - lse.unsqueeze(-1)) @ values
        return output.to(query.dtype), lse.float()
