"""Retaining heads as modules: two matrix products per layer score a token for all KV heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apb_ds.utils.sizes import AttentionSizes


@dataclass(frozen=True)
class HeadSizes(AttentionSizes):
    """The sizes of a model that its heads depend on.

    Attributes
    ----------
    activation : name of the model's activation in transformers
    """

    activation: str


class RetainingHead(nn.Module):
    """``fc2(act(fc1([q; k; v])))`` of one layer, without biases.

    Parameters
    ----------
    fc1 : (hidden, channels)
    fc2 : (kv_heads, hidden)
    activation : name of an activation of transformers
    """

    def __init__(self, fc1: Tensor, fc2: Tensor, activation: str) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.fc1 = nn.Parameter(fc1)
        self.fc2 = nn.Parameter(fc2)
        self.activation = ACT2FN[activation]

    def forward(self, projections: Tensor) -> Tensor:
        """Score tokens.

        Parameters
        ----------
        projections : (..., channels), a token's queries, keys and values concatenated, before rotation

        Returns
        -------
        (..., kv_heads), in the dtype of the weights
        """
        return F.linear(self.activation(F.linear(projections, self.fc1)), self.fc2)


class RetainingHeads(nn.Module):
    """The heads of all layers.

    Parameters
    ----------
    weights : fc1 and fc2 of each layer, with the same shapes in all layers
    activation : name of an activation of transformers
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]], activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.layers: Sequence[RetainingHead] = nn.ModuleList(  # type: ignore[assignment]
            RetainingHead(fc1, fc2, activation) for fc1, fc2 in weights
        )

    @classmethod
    def random(cls, sizes: HeadSizes, hidden_size: int, seed: int = 0) -> RetainingHeads:
        """Make untrained heads in float32, initialised as torch does linear layers; `seed` determines them."""
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int) -> Tensor:
            return (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(columns)

        weights = [
            (draw(hidden_size, sizes.qkv_size), draw(sizes.kv_heads, hidden_size)) for _ in range(sizes.num_layers)
        ]
        return cls(weights, sizes.activation)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].fc1.shape[0]

    @property
    def products_per_token(self) -> int:
        """Multiply-adds of one token in one layer."""
        head = self.layers[0]
        return head.fc1.numel() + head.fc2.numel()

    def forward(self, layer_idx: int, projections: Tensor) -> Tensor:
        """Score tokens in one layer; see `RetainingHead.forward`."""
        return self.layers[layer_idx](projections)

    def placed(self, device: torch.device, dtype: torch.dtype) -> RetainingHeads:
        """Return these heads on a device in a dtype, without gradients; copied only if needed."""
        weights = [tuple(weight.detach().to(device, dtype) for weight in (head.fc1, head.fc2)) for head in self.layers]
        return RetainingHeads(weights, self.activation).requires_grad_(False)  # type: ignore[arg-type]

    def published_state(self) -> Mapping[str, Tensor]:
        """Return the weights under the names of the published checkpoints."""
        return {
            weight_key(layer_idx, name): getattr(head, name).detach()
            for layer_idx, head in enumerate(self.layers)
            for name in ("fc1", "fc2")
        }


def weight_key(layer_idx: int, name: str) -> str:
    """Name of a weight (``fc1`` or ``fc2``) in a checkpoint."""
    return f"model.layers.{layer_idx}.self_attn.{name}.weight"
