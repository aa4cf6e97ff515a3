"""Watch a model attend to two tokens, to find what its config does not say; see `probe_model`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apb_ds.hf.architecture import (
    NOT_ROUTED,
    attention_modules,
    layers_elsewhere,
    position_limit,
    text_config,
    text_decoder,
)
from apb_ds.hf.interface import CHANGES_ATTENTION, ForwardComplete, PassingCache, own_attention
from apb_ds.utils.sizes import LayerAttention
from apb_ds.utils.text import kind_and_line

IMPLEMENTATION = "apb_probe"

Pair = tuple[Tensor, Tensor]  # keys and values


@torch.no_grad()
def probe_model(model: PreTrainedModel) -> tuple[LayerAttention, ...]:
    """Return how each layer attends; refuse a model that attends otherwise than APB serves.

    The model runs twice on two equal tokens: as it is, and with a cache and positions, the second one first. The first
    layer's queries and keys must then change places, or the model does not count positions as the engine does. Its
    attention is replaced by one that returns zeros and notes the arguments.

    Raises
    ------
    ValueError
        If a layer does not call transformers' attention interface exactly once, passes something that APB does not
        serve, attends to what no layer caches, or if the model does not count positions from 0.
    """
    name = type(model).__name__
    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    positions = torch.tensor([[1, 0]], device=ids.device)
    first, calls = _Calls(), _Calls()
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with own_attention(model, IMPLEMENTATION, first.attend):
            _run(model, input_ids=ids, use_cache=False)
        first.check(name, sorted(attention_modules(model)))
        if layers_elsewhere(model):
            first.check_numbers(name)
        with own_attention(model, IMPLEMENTATION, calls.attend):
            cache = PassingCache(calls.note_stored)
            _run(model, input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    finally:
        for module in was_training:
            module.training = True
    if not all(_are_close(plain, given.flip(2)) for plain, given in zip(first.inputs, calls.inputs, strict=True)):
        raise ValueError(f"{name} does not number positions from 0, as the engine does; it cannot be served.")
    layers = calls.layers(name, text_config(model), position_limit(model))
    _check_masked_windows(model, layers)
    return layers


def _check_masked_windows(model: PreTrainedModel, layers: Sequence[LayerAttention]) -> None:
    """Raise ValueError if the model has a window in its masks alone, which it does not make for APB."""
    config, limit = text_config(model), position_limit(model)
    window = getattr(config, "sliding_window", None)
    masks = "create_sliding_window_causal_mask" in vars(sys.modules[type(text_decoder(model)).__module__])
    is_known = getattr(config, "layer_types", None) or any(layer.window is not None for layer in layers)
    if masks and not is_known and isinstance(window, int) and (limit is None or window < limit):
        raise ValueError(
            f"{type(model).__name__} masks its attention to sliding_window={window} tokens without passing the window "
            "to its attention, where APB would see it; it can be served with sliding_window=None."
        )


def _run(model: PreTrainedModel, **inputs: Any) -> None:
    try:
        with suppress(ForwardComplete):
            text_decoder(model)(**inputs)
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        if not any(map(_knows_interface, attention_modules(model).values())):
            raise ValueError(f"{type(model).__name__} {NOT_ROUTED}") from error
        raise ValueError(
            f"{type(model).__name__} cannot run as APB runs it, without an attention mask: {kind_and_line(error)}."
        ) from error


def _knows_interface(module: nn.Module) -> bool:
    """Whether the code that a module comes from mentions the interface, by the name that all of transformers uses."""
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(module).__module__])


@dataclass(frozen=True)
class _Call:
    """One call of the attention function."""

    query: Tensor
    attended: Pair
    window: int | None
    softcap: float | None


class _Calls:
    """What the attention function and the cache were called with, by layer."""

    def __init__(self) -> None:
        self._calls: dict[int, list[_Call]] = {}
        self._unsupported: dict[int, str] = {}
        self.stored: dict[int, list[Pair]] = {}

    def note_stored(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Note what a layer gives its cache."""
        self.stored.setdefault(layer_idx, []).append((keys, values))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer_idx = int(getattr(module, "layer_idx", -1))
        call = _Call(query, (key, value), kwargs.get("sliding_window"), kwargs.get("softcap"))
        self._calls.setdefault(layer_idx, []).append(call)
        kwargs["attention_mask"] = attention_mask
        passed = [name for name in CHANGES_ATTENTION if kwargs.get(name) is not None]
        if passed:
            self._unsupported[layer_idx] = ", ".join(passed)
        batch, heads, tokens, _ = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[-1]), None

    @property
    def inputs(self) -> Pair:
        """The first layer's queries and keys, before any attention."""
        call = self._calls[min(self._calls)][0]
        return call.query, call.attended[0]

    def check(self, name: str, layers: list[int]) -> None:
        """Raise ValueError unless every layer attends once, and to what its arguments say alone."""
        if not self._calls:
            raise ValueError(f"{name} {NOT_ROUTED}")
        for layer_idx in sorted({*layers, *self._calls}):
            count = len(self._calls.get(layer_idx, []))
            if count != 1:
                raise ValueError(
                    f"{name}, layer {layer_idx}, calls transformers' AttentionInterface {count} times in a forward; "
                    "APB serves layers that call it once."
                )
        for layer_idx, passed in sorted(self._unsupported.items()):
            raise ValueError(
                f"{name}, layer {layer_idx}, passes {passed} to its attention, which APB does not support."
            )

    def check_numbers(self, name: str) -> None:
        """Raise ValueError if a stage's layer reads embeddings, NaN on later stages, besides hidden states."""
        for layer_idx, (call,) in sorted(self._calls.items()):
            if not bool(call.query.isfinite().all()):
                raise ValueError(
                    f"{name}, layer {layer_idx}, computes queries that are not finite: it reads embeddings besides "
                    "hidden states, which the first stage of a pipeline alone has."
                )

    def layers(self, name: str, config: Any, limit: int | None) -> tuple[LayerAttention, ...]:
        """Return how each layer attends.

        Parameters
        ----------
        config : of the model's text part
        limit : how many positions the model has, if that is limited; a window of as many limits nothing
        """
        layer_types = getattr(config, "layer_types", None) or []
        found = []
        for layer_idx, (call,) in sorted(self._calls.items()):
            where = f"{name}, layer {layer_idx},"
            window = call.window if call.window is None or limit is None or call.window < limit else None
            if call.window is None and layer_types[layer_idx : layer_idx + 1] == ["sliding_attention"]:
                raise ValueError(f"{where} is a sliding-window layer but passes no window to its attention.")
            layer = self._layer(where, layer_idx, call, window)
            if window is not None and layer.stores and not layer.stores_attended:
                raise ValueError(
                    f"{where} caches other states than it attends to, which APB does not support in sliding-window "
                    "layers."
                )
            found.append(layer)
        return tuple(found)

    def _layer(self, where: str, layer_idx: int, call: _Call, window: int | None) -> LayerAttention:
        stored = self.stored.get(layer_idx, [])
        is_anothers = not stored and any(
            _are_equal(call.attended, pair) for pairs in self.stored.values() for pair in pairs
        )
        if len(stored) != 1 and not is_anothers:
            raise ValueError(f"{where} updates its cache {len(stored)} times in a forward; APB supports one update.")
        keys, values = call.attended
        attends_to_stored = bool(stored) and _are_equal(call.attended, stored[0])
        latents = None
        if stored and not attends_to_stored:
            of_keys, of_values = ((states.shape[1], states.shape[3]) for states in stored[0])
            latents = of_keys, of_values
        return LayerAttention(
            heads=call.query.shape[1],
            kv_heads=keys.shape[1],
            head_dim=keys.shape[-1],
            value_dim=values.shape[-1],
            window=window,
            softcap=call.softcap,
            stores=bool(stored),
            stores_attended=attends_to_stored,
            latents=latents,
            dtype=keys.dtype,
        )


def _are_close(states: Tensor, others: Tensor) -> bool:
    """Whether states differ by no more than rounding; a position that is off by one changes them tenfold as much."""
    return float((states - others).float().norm()) <= 0.01 * float(states.float().norm())


def _are_equal(pair: Pair, other: Pair) -> bool:
    return all(map(torch.equal, pair, other))
