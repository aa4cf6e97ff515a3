"""Rotary frequencies: kept in float32, and fixed for a whole request if a model picks them by position."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apb_ds.hf.architecture import check_positions
from apb_ds.hf.overrides import Function, forward_override, overridden

logger = logging.getLogger(__name__)

# Rotary embeddings that pick their frequencies from the largest position of each forward.
POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")


def warn_of_rough_frequencies(model: nn.Module) -> None:
    """Warn if rotary frequencies came in half precision: the model is used as it is, and blurs far positions."""
    rough = [getattr(module, "inv_freq", None) for module in model.modules()]
    dtypes = {
        str(freq.dtype).removeprefix("torch.") for freq in rough if isinstance(freq, Tensor) and freq.itemsize < 4
    }
    if dtypes:
        logger.warning(
            "This model's rotary frequencies are %s, which blurs far positions with any method: the whole model was "
            "converted (model.bfloat16() or deepspeed.init_inference). Load it with dtype=... instead, and make the "
            "engine with apb_ds.init_inference, which keeps the frequencies in float32.",
            ", ".join(sorted(dtypes)),
        )


@contextmanager
def fixed_rotary_frequencies(model: PreTrainedModel, max_positions: int) -> Iterator[None]:
    """Have rotary modules choose their frequencies for position ``max_positions - 1`` in every forward of this context.

    This concerns only scalings that depend on a forward's positions; the modules are restored on leaving.
    """
    rotary = [module for module in model.modules() if is_position_dependent_rope(module)]
    with ExitStack() as stack:
        for module in rotary:
            stack.callback(_restore_rotary, module, _rotary_state(module))
            _reset_rotary(module)
        stack.enter_context(
            overridden(forward_override(module, _with_last_position(max_positions - 1)) for module in rotary)
        )
        yield


@contextmanager
def rotary_frequencies_by_reach(model: PreTrainedModel, reaches: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Have rotary modules choose frequencies for each group of a forward's tokens, as `fixed_rotary_frequencies` does.

    For a forward inside another one, first leave that one's overrides aside.

    Parameters
    ----------
    reaches : numbers of tokens that follow each other, and the positions that each group can use
    """
    rotary = [module for module in model.modules() if is_position_dependent_rope(module)]
    with overridden(forward_override(module, _by_reach(module, reaches)) for module in rotary):
        yield


def is_position_dependent_rope(module: nn.Module) -> bool:
    """Whether the module is a rotary embedding whose frequencies depend on the positions of a forward."""
    return hasattr(module, "inv_freq") and getattr(module, "rope_type", None) in POSITION_DEPENDENT_ROPE


def _rotary_state(module: Any) -> tuple[Tensor, dict[str, Any]]:
    kept = {
        name: getattr(module, name) for name in ("max_seq_len_cached", "attention_scaling") if hasattr(module, name)
    }
    return module.inv_freq.clone(), kept


def _restore_rotary(module: Any, before: tuple[Tensor, dict[str, Any]]) -> None:
    inv_freq, kept = before
    module.inv_freq = inv_freq
    for name, value in kept.items():
        setattr(module, name, value)


def _reset_rotary(module: Any) -> None:
    """Undo the growth that an earlier, longer forward left behind."""
    if hasattr(module, "original_inv_freq") and hasattr(module, "original_max_seq_len"):
        module.inv_freq = module.original_inv_freq.clone()
        module.max_seq_len_cached = module.original_max_seq_len


def _with_last_position(position: int) -> Callable[[Function], Function]:
    """Return what makes a rotary module's forward see one more position, the last one, and drop its rotation."""

    def make(forward: Function) -> Function:
        def run(hidden: Tensor, position_ids: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            last = position_ids.new_full((*position_ids.shape[:-1], 1), position)
            cos, sin = forward(hidden, torch.cat([position_ids, last], dim=-1), *rest, **kwargs)
            return cos[..., :-1, :], sin[..., :-1, :]

        return run

    return make


def _by_reach(module: Any, reaches: Sequence[tuple[int, int]]) -> Callable[[Function], Function]:
    """Return what makes a rotary module's forward go through groups of tokens, each with its own last position."""

    def make(plain: Function) -> Function:
        def run(hidden: Tensor, position_ids: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            before = _rotary_state(module)
            parts = []
            try:
                groups = position_ids.split([num_tokens for num_tokens, _ in reaches], dim=-1)
                for positions, (_, max_positions) in zip(groups, reaches, strict=True):
                    _reset_rotary(module)
                    forward = _with_last_position(max_positions - 1)(plain)
                    parts.append(forward(hidden, positions, *rest, **kwargs))
            finally:
                _restore_rotary(module, before)
            cos, sin = (torch.cat(of, dim=-2) for of in zip(*parts, strict=True))
            return cos, sin

        return run

    return make


def check_reach(model: PreTrainedModel, max_positions: int, num_positions: int) -> None:
    """Refuse a turn that needs rotary frequencies other than those its context was prefilled with.

    Parameters
    ----------
    max_positions : positions that the context's frequencies were chosen for
    num_positions : positions that the turn needs, the document's included
    """
    check_positions(model, num_positions)
    rotary = [module for module in model.modules() if is_position_dependent_rope(module)]
    rotary = [module for module in rotary if _frequencies_differ(module, max_positions, num_positions)]
    if num_positions > max_positions and rotary:
        raise ValueError(
            f"this turn needs {num_positions} positions; the context was prefilled for {max_positions}, and the "
            f"model's rotary frequencies ({rotary[0].rope_type}) depend on that. "
            f"Use prefill(..., max_positions={num_positions}) or more."
        )


def _frequencies_differ(module: Any, max_positions: int, num_positions: int) -> bool:
    """Whether a rotary module chooses different frequencies for `num_positions` and `max_positions`."""
    if module.rope_type == "longrope":
        switch = module.config.rope_parameters["original_max_position_embeddings"]
        return (max_positions > switch) != (num_positions > switch)
    return max(max_positions, num_positions) > module.original_max_seq_len
