"""One forward of the frozen model that yields, layer by layer, a head's input and what its labels are made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from apb_ds.hf.interface import captured_projections, own_attention

NAME = "apb_heads_training"

# Called as observe(layer_idx, projections, queries, keys, scale, values): the head's input, (tokens, channels); queries
# and keys rotated, (1, heads, tokens, head_dim).
Observe = Callable[[int, Tensor, Tensor, Tensor, float, Tensor], None]


@torch.no_grad()
def observe_layers(model: PreTrainedModel, input_ids: Tensor, observe: Observe) -> None:
    """Run the model with causal attention, and call `observe` in each layer, in order.

    Parameters
    ----------
    input_ids : (1, tokens), int64
    """
    projected: list[Tensor] = []

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        projections = torch.cat([output[0] for output in projected], dim=-1)
        projected.clear()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        observe(int(module.layer_idx), projections, query, key, scale, value)  # type: ignore[arg-type]
        output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scale, is_causal=True)
        return output, None

    with (
        captured_projections(model, lambda layer_idx, output: projected.append(output)),
        own_attention(model, NAME, attention),
    ):
        model.base_model(input_ids=input_ids, use_cache=False)
