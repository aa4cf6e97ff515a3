"""Watch a model attend to two tokens, to find what its config does not say; see `probe_model`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apb_ds.hf.architecture import attention_modules
from apb_ds.hf.interface import CHANGES_ATTENTION, own_attention
from apb_ds.utils.text import kind_and_line

IMPLEMENTATION = "apb_probe"


@torch.no_grad()
def probe_model(model: PreTrainedModel) -> dict[int, int]:
    """Refuse a model that attends otherwise than APB serves; return the windows of its layers.

    The model runs twice on two tokens: as it is, and with positions 0 and 1 given, as the engine gives them. Its
    attention is replaced by one that returns zeros and notes the arguments.

    Returns
    -------
    dict : layer index -> window in tokens, of the layers that attend within one

    Raises
    ------
    ValueError
        If a layer does not call transformers' attention interface exactly once, passes something that makes its
        attention more than plain softmax attention, or if the model does not count positions from 0.
    """
    name = type(model).__name__
    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    calls = _Calls()
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with own_attention(model, IMPLEMENTATION, calls.attend):
            with _positions_noted(model) as plain:
                _run(model, input_ids=ids)
            calls.check(name, sorted(attention_modules(model)))
            with _positions_noted(model) as given:
                _run(model, input_ids=ids, position_ids=torch.arange(2, device=ids.device).unsqueeze(0))
    finally:
        for module in was_training:
            module.training = True
    if len(plain) != len(given) or not all(map(torch.equal, plain, given)):
        raise ValueError(f"{name} does not number positions from 0, as the engine does; it cannot be served.")
    return calls.windows


def _run(model: PreTrainedModel, **inputs: Tensor) -> None:
    try:
        model.base_model(**inputs, use_cache=False)
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot run as APB runs it, on {' and '.join(inputs)} without an attention mask: "
            f"{kind_and_line(error)}."
        ) from error


class _Calls:
    """What the attention function was called with, by layer."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.windows: dict[int, int] = {}
        self.unsupported: dict[int, str] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer_idx = int(getattr(module, "layer_idx", -1))
        self.counts[layer_idx] += 1
        if kwargs.get("sliding_window") is not None:
            self.windows[layer_idx] = int(kwargs["sliding_window"])
        kwargs["attention_mask"] = attention_mask
        passed = [name for name in CHANGES_ATTENTION if kwargs.get(name) is not None]
        if passed:
            self.unsupported[layer_idx] = ", ".join(passed)
        batch, heads, tokens, _ = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[-1]), None

    def check(self, name: str, layers: list[int]) -> None:
        """Raise ValueError unless every layer attends once, and plainly."""
        for layer_idx in sorted({*layers, *self.counts}):
            count = self.counts[layer_idx]
            if count != 1:
                raise ValueError(
                    f"{name}, layer {layer_idx}, calls transformers' AttentionInterface {count} times in a forward; "
                    "APB serves layers that call it once."
                )
        for layer_idx, passed in sorted(self.unsupported.items()):
            raise ValueError(
                f"{name}, layer {layer_idx}, passes {passed} to its attention, which APB does not support."
            )


@contextmanager
def _positions_noted(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the integer tensors that embeddings and rotary modules are given."""
    noted: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        noted.extend(part.clone() for part in given if isinstance(part, Tensor) and not part.is_floating_point())

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding) or hasattr(module, "inv_freq"):
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield noted
