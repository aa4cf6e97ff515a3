"""The obvious, slow kernel: float64, the full matrix of logits. Tests compare every other kernel with it."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.ops.kernels.base import Kernel, expand_kv_heads


class ReferenceKernel(Kernel):
    """Softmax attention in float64 on any device. Memory grows with queries x keys."""

    name = "reference"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        heads = query.shape[1]
        keys, values = (expand_kv_heads(states.double(), heads) for states in (key, value))
        logits = query.double() @ keys.transpose(-1, -2) * scale
        if causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        lse = torch.logsumexp(logits, dim=-1)
        output = torch.exp(logits - lse.unsqueeze(-1)) @ values
        return output.to(query.dtype), lse.float()
