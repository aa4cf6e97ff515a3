"""An engine's attention computed a second time by the reference, from the same queries, keys and values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apb_ds.attention import APBAttention
from apb_ds.cache import ShardedCache
from apb_ds.compressors.base import Compressor
from apb_ds.engine.engine import APBEngine
from apb_ds.methods.state import PrefillState


class Shadow:
    """Runs the reference on the inputs of an engine's attention, and keeps the errors of the engine's outputs.

    Parameters
    ----------
    engine : on one rank
    compressor : chooses for the reference; it must choose the same tokens as the engine's
    kernel : the reference's name
    """

    def __init__(self, engine: APBEngine, compressor: Compressor, kernel: str) -> None:
        self._attention = APBAttention(replace(engine.apb_config, kernel=kernel, fused=False), engine.group)
        self._attention.compressor = compressor
        self._states: dict[int, tuple[PrefillState, PrefillState]] = {}
        self._squares: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def compare(self, output: Tensor, states: tuple[Tensor, ...], given: dict[str, Any]) -> None:
        """Compute in float32 what the attention should have returned for `states`, and keep the error of `output`."""
        state: PrefillState | None = given.pop("state", None)
        given.pop("num_keys", None)
        expected = self._attention(*(each.float() for each in states), state=self._own(state), **given)
        if state is not None and state.is_last_layer(given["layer_idx"]):
            return  # not needed, so the engine has not computed it
        difference = (output.float() - expected).square().sum()
        self._squares[given["layer_idx"]].append((difference, expected.square().sum()))

    def errors(self) -> list[float]:
        """Return each layer's relative error, over prefill and the query's tokens."""
        sums = (torch.tensor(squares).sum(dim=0) for _, squares in sorted(self._squares.items()))
        return [float((difference / expected).sqrt()) for difference, expected in sums]

    def _own(self, state: PrefillState | None) -> PrefillState | None:
        """Return the reference's state of a prefill, in the engine's current round."""
        if state is None:
            return None
        if id(state) not in self._states:
            cache = ShardedCache(state.cache.attention, 0, 1, state.plan.shard_length(state.rank))
            self._states[id(state)] = state, PrefillState(state.plan, cache, state.rank)
        own = self._states[id(state)][1]
        own.round_index = state.round_index
        return own


@contextmanager
def shadowed(engine: APBEngine, compressor: Compressor, kernel: str) -> Iterator[Shadow]:
    """Have the reference follow the engine's attention; leaving restores the engine."""
    shadow = Shadow(engine, compressor, kernel)
    attention = engine.attention
    attend = attention.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        output = attend(query, key, value, **given)
        shadow.compare(output, (query, key, value), dict(given))
        return output

    attention.__dict__["forward"] = forward
    try:
        yield shadow
    finally:
        del attention.__dict__["forward"]
