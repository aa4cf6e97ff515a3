"""How good heads are on held-out documents."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apb_ds.compressors.base import max_pool
from apb_ds.ops.selection import select_top
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import split_evenly
from apb_ds.training.batches import Example, pad_examples
from apb_ds.training.heads.labels import attention_received, label_tokens
from apb_ds.training.heads.module import HeadsLoss
from apb_ds.training.heads.observe import observe_layers

TOP_SHARE = 0.1


@torch.no_grad()
def measure(loss: HeadsLoss, example: Example, hosts: int, ratio: float, device: torch.device) -> dict[str, float]:
    """Measure the heads on one conversation.

    Parameters
    ----------
    hosts, ratio : how many tokens to keep, as in a prefill: of each of `hosts` blocks, one in `ratio`

    Returns
    -------
    dict
        ``loss``; ``overlap``: of the tenth of tokens with the largest labels, the share in the tenth with the largest
        scores; ``mass``: of the observers' attention to the document, the share on kept tokens; ``mass_random`` and
        ``mass_best``: the same for random tokens, on average, and for those with the most attention. Means over layers
        and KV heads.
    """
    batch = pad_examples([example], 0)
    view = loss.view(batch.is_marked[0].to(device), example.num_document)
    sums: dict[str, list[float]] = defaultdict(list)
    losses = []

    def observe(
        layer_idx: int, projections: Tensor, queries: Tensor, keys: Tensor, scale: float, values: Tensor
    ) -> None:
        labels = label_tokens(loss.kind, view, queries, keys, scale, values)
        scores = loss.heads(layer_idx, projections[: view.num_document]).float()
        losses.append(loss.layer_loss(scores[: view.num_scored], labels))
        sums["overlap"].append(_overlap(scores[: view.num_scored].T, labels.T))
        received = attention_received(view, queries, keys, scale)
        received = torch.nn.functional.pad(received, (0, view.num_document - view.num_scored))
        for name, value in _kept_mass(scores.T, received, hosts, ratio).items():
            sums[name].append(value)

    observe_layers(loss.model, batch.input_ids.to(device), observe)
    return {"loss": float(torch.stack(losses).sum())} | {name: sum(of) / len(of) for name, of in sums.items()}


def _overlap(scores: Tensor, labels: Tensor) -> float:
    """Return the share of the top tenth of labels, (kv_heads, tokens), in the top tenth of scores."""
    count = max(1, math.ceil(TOP_SHARE * labels.shape[1]))
    chosen, best = (
        torch.zeros_like(labels, dtype=torch.bool).scatter_(1, select_top(values.contiguous(), count), True)
        for values in (scores, labels)
    )
    return float((chosen & best).sum() / best.sum())


def _kept_mass(scores: Tensor, received: Tensor, hosts: int, ratio: float) -> dict[str, float]:
    """Return the share of the attention received, (kv_heads, tokens), on the tokens kept of each block."""
    total = received.sum(dim=1)
    longest = math.ceil(received.shape[1] / hosts)
    kept: dict[str, Tensor] = {name: torch.zeros_like(total) for name in ("mass", "mass_random", "mass_best")}
    for start, stop in split_evenly(received.shape[1], hosts):
        if start == stop:
            continue
        block = received[:, start:stop]
        count = min(math.ceil(longest / ratio), stop - start)
        kept["mass"] += block.gather(1, select_top(max_pool(scores[:, start:stop]), count)).sum(dim=1)
        kept["mass_random"] += block.sum(dim=1) * count / (stop - start)
        kept["mass_best"] += block.gather(1, select_top(block.contiguous(), count)).sum(dim=1)
    return {name: float((mass / total).mean()) for name, mass in kept.items()}


def measure_all(
    loss: HeadsLoss,
    examples: Sequence[Example],
    group: SequenceGroup,
    *,
    hosts: int,
    ratio: float,
    device: torch.device,
) -> dict[str, Any]:
    """Measure the heads on all examples, each rank on its share. All ranks call this together.

    Returns
    -------
    dict
        The means of `measure` over all examples, and in ``by_kind`` over those of each kind.
    """
    mine = {
        index: measure(loss, examples[index], hosts, ratio, device)
        for index in range(group.rank, len(examples), group.world_size)
    }
    measured = {index: found for of_rank in group.gather_objects(mine) for index, found in of_rank.items()}
    by_kind: dict[str, list[dict[str, float]]] = defaultdict(list)
    for index, example in enumerate(examples):  # in order, so that sums do not depend on the number of ranks
        by_kind[example.kind].append(measured[index])
    everything = [measured[index] for index in range(len(examples))]
    return _means(everything) | {"by_kind": {kind: _means(found) for kind, found in sorted(by_kind.items())}}


def _means(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(each[name] for each in measured) / len(measured), 5) for name in measured[0]}
