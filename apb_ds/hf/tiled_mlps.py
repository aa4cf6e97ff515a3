"""A decoder's MLPs, a tile of tokens at a time: what lies between their projections takes the memory of one tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]

# What a gated MLP has besides `down_proj`.
GATES = (("gate_proj", "up_proj"), ("gate_up_proj",))


# So many tokens' intermediate states fit a core's cache: meant to keep them there between the products.
CPU_TILE = 256


def default_tile(device: torch.device) -> int | None:
    """Return the tile where none is asked for; None for all tokens at once."""
    return CPU_TILE if device.type == "cpu" else None


def mlp_modules(model: nn.Module) -> list[nn.Module]:
    """Return the gated MLPs of a decoder, whose output at a token depends on that token alone."""
    return [module for module in model.modules() if _is_mlp(module)]


def _is_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return "down_proj" in children and any(all(name in children for name in names) for names in GATES)


def check_tile(model: nn.Module, tile: int | None) -> None:
    """Refuse to tile what has no MLP that is known.

    Raises
    ------
    ValueError
        If tiles are asked for and the model has no gated MLP.
    """
    if tile is not None and not mlp_modules(model):
        raise ValueError(
            f"mlp_tile={tile} needs MLPs with gate_proj, up_proj and down_proj, or gate_up_proj and down_proj; "
            f"{type(model).__name__} has none. Leave it out."
        )


@contextmanager
def tiled_mlps(model: nn.Module, tile: int | None) -> Iterator[None]:
    """Have the model's MLPs compute `tile` tokens at a time, or all at once with None; on leaving, all is as it was."""
    modules = mlp_modules(model) if tile is not None else []
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module in modules:
            assert tile is not None
            module.__dict__["forward"] = _tiled(module.forward, tile)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


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
