"""The numbers of a job's record: plan and times of a prefill, its operations, and what the job used."""

from __future__ import annotations

from typing import Any

import torch

from apb_ds.engine.context import Context
from apb_ds.hf.architecture import text_config, text_decoder
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.report.flops import ModelSizes, count_flops
from apb_ds.report.memory import peak_memory_bytes, reset_peak_memory
from apb_ds.report.record import rate
from apb_ds.session.steps import gather_numbers


class Usage:
    """Bytes sent and peak memory from its creation on."""

    def __init__(self, group: SequenceGroup, device: torch.device) -> None:
        reset_peak_memory(device)
        self._group = group
        self._device = device
        self._sent_before = group.bytes_sent

    def metrics(self) -> dict[str, Any]:
        """Return the numbers of each rank. All ranks call this together."""
        sent, peak = self._group.bytes_sent - self._sent_before, peak_memory_bytes(self._device)
        numbers = gather_numbers(self._group, bytes_sent=sent, peak=peak)
        return {
            "bytes_sent": numbers["bytes_sent"],
            "peak_memory_bytes": max(numbers["peak"]),
            "peak_memory_bytes_per_rank": numbers["peak"],
        }


def plan_metrics(context: Context, group: SequenceGroup) -> dict[str, Any]:
    """Return a prefill's plan, and its time on the slowest rank and on each. All ranks call this together."""
    plan = context.plan
    num_tokens = plan.num_tokens
    prefill_s = gather_numbers(group, prefill_s=context.prefill_s)["prefill_s"]
    return {
        "document_tokens": num_tokens,
        "hosts": plan.hosts,
        "ranks": plan.world_size,
        "stages": group.world_size // plan.world_size,
        "rounds": len(plan.rounds),
        "block_length": max(plan.block_length(host) for host in range(plan.hosts)),
        "anchor_length": plan.anchor_length,
        "passing_length": plan.passing_length,
        "kept_lengths": list(plan.kept_lengths),
        "exact": plan.exact,
        "prefill_s": max(prefill_s),
        "prefill_s_per_rank": prefill_s,
        "prefill_tokens_per_s": rate(num_tokens, max(prefill_s)),
    }


def count_prefill(engine: Any, context: Context, num_query: int, *, num_logits: int = 1) -> dict[str, Any] | None:
    """Return the operations of a prefill and of the query after it, as `PrefillFlops.as_dict` gives them.

    None for a model whose linear layers differ from what its config's sizes imply (experts, an MLP without a gate,
    quantised weights).
    """
    model, plan = engine.module, context.plan
    sizes = ModelSizes.from_config(text_config(model), tuple(layer.window for layer in engine.layers))
    linears = (module for module in text_decoder(model).modules() if isinstance(module, torch.nn.Linear))
    if sizes is None or sum(linear.in_features * linear.out_features for linear in linears) != sizes.linear_weights:
        return None
    compressor = engine.attention.compressor
    ranks = 1 if engine.weights is None else engine.weights.gatherer.group.world_size
    counted = count_flops(
        sizes, plan, compressor=compressor, query_length=num_query, num_logits=num_logits, weight_ranks=ranks
    )
    return counted.as_dict()
