"""Labels for heads: how much later tokens attend to a token, in the model's own attention.

No matrix here is tokens x tokens: only the observers' rows of attention are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from apb_ds.config import check_bool, check_choice
from apb_ds.plan import split_evenly

VALUES = ("logit", "weight", "log_weight")
REDUCTIONS = ("max", "mean", "logmeanexp")
MIN_NORM = 1e-6


@dataclass(frozen=True)
class LabelKind:
    """How attention becomes labels.

    Parameters
    ----------
    label : str
        ``logit``: scaled, before softmax (Locret). ``weight``: after softmax, times the number of tokens that the
        observer sees, so that a uniform share is 1. ``log_weight``: the logarithm of the weight, without that factor.
    over_observers, over_heads : str
        Reduction over the observers, and over the query heads of a KV head: ``max`` (Locret), ``mean``, or
        ``logmeanexp``, the logarithm of the mean of exponentials (for log weights, of the mean weight).
    standardise : bool
        Whether each KV head's labels have mean 0 and variance 1 over the document.
    value_norms : bool
        Whether to multiply weights by the norm of the token's value, as the token's contribution to the output.

    Raises
    ------
    ValueError
        For an unknown name, or value norms without weights.
    """

    label: str = "logit"
    over_observers: str = "max"
    over_heads: str = "max"
    standardise: bool = False
    value_norms: bool = False

    def __post_init__(self) -> None:
        check_choice("train.label", self.label, VALUES)
        check_choice("train.over_observers", self.over_observers, REDUCTIONS)
        check_choice("train.over_heads", self.over_heads, REDUCTIONS)
        check_bool("train.standardise", self.standardise)
        check_bool("train.value_norms", self.value_norms)
        if self.value_norms and self.label == "logit":
            raise ValueError("train.value_norms=true needs weights: set train.label to weight or log_weight.")


@dataclass(frozen=True)
class View:
    """Which tokens observe which others in one conversation.

    Attributes
    ----------
    rows : (observers,), int64, ascending positions of the observers
    num_document : number of tokens, from the first, that are the document, which is observed
    visible : (observers, num_scored), bool, which observations count
    """

    rows: Tensor
    num_document: int
    visible: Tensor

    @property
    def num_scored(self) -> int:
        """Number of tokens, from the first, that are observed at all."""
        return self.visible.shape[1]


def make_view(rows: Tensor, num_document: int, hosts: int | None = None) -> View:
    """Return the view in which an observer sees all earlier tokens, or only those in earlier blocks.

    Parameters
    ----------
    rows : (observers,), int64, ascending
    hosts : number of blocks in the document; tokens after the document observe all of them

    Raises
    ------
    ValueError
        If nothing is observed.
    """
    positions = torch.arange(num_document, device=rows.device)
    if hosts is None:
        visible = positions < rows.unsqueeze(1)
    else:
        starts = torch.tensor([start for start, _ in split_evenly(num_document, hosts)], device=rows.device)
        blocks = torch.bucketize(positions, starts, right=True)
        of_rows = torch.bucketize(rows, starts, right=True)
        of_rows[rows >= num_document] = hosts + 1
        visible = blocks < of_rows.unsqueeze(1)
    num_scored = int(visible.any(dim=0).sum())
    if num_scored == 0:
        raise ValueError("no later token observes any token of the document.")
    return View(rows, num_document, visible[:, :num_scored])


def label_tokens(kind: LabelKind, view: View, queries: Tensor, keys: Tensor, scale: float, values: Tensor) -> Tensor:
    """Return the labels of one layer.

    Parameters
    ----------
    queries : (1, heads, tokens, head_dim), rotated
    keys : (1, kv_heads, tokens, head_dim), rotated
    scale : factor on the logits
    values : (1, kv_heads, tokens, head_dim)

    Returns
    -------
    (num_scored, kv_heads), float32
    """
    labels = []
    for logits in _observed_logits(view, queries, keys, scale):
        seen = _valued(kind.label, logits, view)
        by_head = _reduced(kind.over_observers, seen, view.visible)
        labels.append(_reduced(kind.over_heads, by_head.unsqueeze(0), torch.ones_like(by_head, dtype=torch.bool))[0])
    stacked = torch.stack(labels, dim=1)
    if kind.value_norms:
        norms = values[0, :, : view.num_scored].float().norm(dim=-1).T
        # The same for all observers and heads of a group, so it can be applied after the reductions.
        stacked = stacked + norms.clamp_min(MIN_NORM).log() if kind.label == "log_weight" else stacked * norms
    if kind.standardise:
        spread = stacked.std(dim=0, keepdim=True, correction=0)
        stacked = (stacked - stacked.mean(dim=0, keepdim=True)) / spread.clamp_min(1e-6)
    return stacked


def attention_received(view: View, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the attention weight that each token gets, summed over observers and each group's heads.

    Returns
    -------
    (kv_heads, num_scored), float32
    """
    received = []
    for logits in _observed_logits(view, queries, keys, scale):
        weights = logits.softmax(dim=-1)[..., : view.num_scored]
        received.append(weights.masked_fill(~view.visible, 0.0).sum(dim=(0, 1)))
    return torch.stack(received)


def _observed_logits(view: View, queries: Tensor, keys: Tensor, scale: float) -> Iterator[Tensor]:
    """Yield each KV head's causal logits, (heads per KV head, observers, tokens), float32; -inf where masked."""
    kv_heads, tokens = keys.shape[1:3]
    observing = queries[0, :, view.rows].unflatten(0, (kv_heads, -1))
    hidden = torch.arange(tokens, device=keys.device) > view.rows.unsqueeze(1)
    for of_group, of_head in zip(observing, keys[0], strict=True):
        logits = (of_group.float() * scale) @ of_head.float().transpose(0, 1)
        yield logits.masked_fill_(hidden, -torch.inf)


def _reduced(reduction: str, values: Tensor, counts: Tensor) -> Tensor:
    """Reduce values, (heads, observers, tokens), over the observers that count, (observers, tokens)."""
    if reduction == "max":
        return values.masked_fill(~counts, -torch.inf).amax(dim=1)
    if reduction == "mean":
        return values.masked_fill(~counts, 0.0).sum(dim=1) / counts.sum(dim=0)
    return values.masked_fill(~counts, -torch.inf).logsumexp(dim=1) - counts.sum(dim=0).log()


def _valued(value: str, logits: Tensor, view: View) -> Tensor:
    """Return the value of each observation, (heads per KV head, observers, num_scored)."""
    if value == "logit":
        return logits[..., : view.num_scored]
    if value == "log_weight":
        return logits.log_softmax(dim=-1)[..., : view.num_scored]
    return logits.softmax(dim=-1)[..., : view.num_scored] * (view.rows + 1).unsqueeze(1)
