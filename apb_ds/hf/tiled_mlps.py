"""Run a decoder's MLPs a tile of tokens at a time, so that their intermediate states take the memory of one tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from apb_ds.hf.overrides import forward_override, overridden
from apb_ds.hf.zero3 import is_partitioned

Forward = Callable[[Tensor], Tensor]

# The projections of a gated MLP besides `down_proj`.
GATES = (("gate_proj", "up_proj"), ("gate_up_proj",))

# Small enough for the intermediate states of a tile to stay in a core's cache between the products.
CPU_TILE = 256


def default_tile(device: torch.device) -> int | None:
    """Return the default tile for a device; None means all tokens at once."""
    return CPU_TILE if device.type == "cpu" else None


def mlp_modules(model: nn.Module) -> list[nn.Module]:
    """Return the gated MLPs of a decoder, whose output at a token depends on that token alone."""
    return [module for module in model.modules() if _is_mlp(module)]


def _is_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return "down_proj" in children and any(all(name in children for name in names) for names in GATES)


def check_tile(model: nn.Module, tile: int | None) -> None:
    """Refuse a tile for a model without a known MLP.

    Raises
    ------
    ValueError
        If a tile is given and the model has no gated MLP, or partitioned weights.
    """
    if tile is not None and is_partitioned(model):
        raise ValueError(
            f"mlp_tile={tile} would gather an MLP's weights, which DeepSpeed ZeRO-3 partitions, for each tile, and on "
            "ranks with more tokens more often than on others. Leave mlp_tile out."
        )
    if tile is not None and not mlp_modules(model):
        raise ValueError(
            f"mlp_tile={tile} needs MLPs with gate_proj, up_proj and down_proj, or gate_up_proj and down_proj; "
            f"{type(model).__name__} has no such MLP. Leave mlp_tile out."
        )


@contextmanager
def tiled_mlps(model: nn.Module, tile: int | None) -> Iterator[None]:
    """Have the model's MLPs compute `tile` tokens at a time in this context; restore them on leaving."""
    if tile is None:
        yield
        return
    with overridden(forward_override(module, lambda forward: _tiled(forward, tile)) for module in mlp_modules(model)):
        yield


def _tiled(forward: Forward, tile: int) -> Forward:
    def run(hidden: Tensor) -> Tensor:
        """Compute (..., tokens, channels)."""
        tokens = hidden.shape[-2]
        if tokens <= tile:
            return forward(hidden)
        first = forward(hidden[..., :tile, :])
        output = torch.empty((*hidden.shape[:-1], first.shape[-1]), dtype=first.dtype, device=first.device)
        output[..., :tile, :] = first
        for start in range(tile, tokens, tile):
            output[..., start : start + tile, :] = forward(hidden[..., start : start + tile, :])
        return output

    return run
