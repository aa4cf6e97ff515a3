"""An engine's operations: matrix products counted by torch, pairs of tokens by a kernel."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import apb_ds
from apb_ds.ops.kernels import Kernel, KernelChoice
from apb_ds.ops.kernels.base import Logits
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.session.metrics import count_prefill
from tests.heads import engine_with_heads
from tests.models import FAMILIES, HYBRIDS, request_ids

QUERY = 6


class CountingKernel(Kernel):
    """Counts the pairs of tokens it is given instead of computing: operations do not depend on values."""

    name = "counting"
    has_window = True
    has_softcap = True

    def __init__(self) -> None:
        self.flops = 0

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        _, heads, queries, head_dim = query.shape
        keys = key.shape[2]
        last = range(keys - queries + 1, keys + 1) if logits.causal else [keys] * queries
        pairs = sum(min(seen, logits.window or keys) for seen in last)
        self.flops += 4 * heads * head_dim * pairs
        return torch.zeros_like(query), torch.zeros(query.shape[:3])


def run_counted(
    rank: int, world_size: int, family: str, n: int, given: dict[str, Any], kv_heads: int = 2, **options: Any
) -> tuple[int, int, dict[str, Any] | None]:
    """Return one rank's operations for a prefill and for the query after it, and the count for all ranks.

    Parameters
    ----------
    n : document tokens; the query has `QUERY`
    given : `APBConfig` fields
    options : of `init_inference`
    """
    engine = _engine(_group(world_size), family, given, kv_heads, **options)
    document, query, needs_query = _request(engine, n)
    with mock.patch("apb_ds.hf.onednn_linears._is_enabled", lambda: False):  # torch does not count oneDNN's products
        context, prefilled = _measure(engine, lambda: engine.prefill(document, query if needs_query else None))
        _, asked = _measure(engine, lambda: engine.query_logits(query, context=context))
    return prefilled, asked, count_prefill(engine, context, QUERY, num_logits=QUERY)


def run_prefill_counted(
    rank: int,
    world_size: int,
    family: str,
    n: int,
    given: dict[str, Any],
    kv_heads: int = 2,
    group: SequenceGroup | None = None,
) -> tuple[int, int]:
    """Return the operations that one rank computed for a prefill, and the bytes that it sent.

    Parameters
    ----------
    group : of an emulated rank; by default the pool's
    """
    engine = _engine(group or _group(world_size), family, given, kv_heads)
    document, query, needs_query = _request(engine, n)
    with mock.patch("apb_ds.hf.onednn_linears._is_enabled", lambda: False):
        context, flops = _measure(engine, lambda: engine.prefill(document, query if needs_query else None))
    return flops, context.bytes_sent


def _group(world_size: int) -> SequenceGroup:
    return SequenceGroup() if world_size == 1 else SequenceGroup.of(torch.distributed.group.WORLD)


def _engine(group: SequenceGroup, family: str, given: dict[str, Any], kv_heads: int, **options: Any) -> Any:
    engine = engine_with_heads((FAMILIES | HYBRIDS)[family](num_key_value_heads=kv_heads), group=group, **options)
    engine.configure(apb_ds.APBConfig(**given))
    return engine


def _request(engine: Any, n: int) -> tuple[Tensor, Tensor, bool]:
    """Return document, query, and whether the anchor embeds the query."""
    return *request_ids(n, QUERY), bool(engine.apb_config.resolved()["query_in_anchor"])


def _measure(engine: Any, work: Any) -> tuple[Any, int]:
    kernel = CountingKernel()
    engine.attention.kernels_for = lambda *_, **__: KernelChoice(kernel, kernel)
    with FlopCounterMode(display=False) as counter:
        result = work()
    # The rotary angles are an outer product, which torch counts among matrix products.
    angles = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return result, counter.get_total_flops() - angles + kernel.flops
