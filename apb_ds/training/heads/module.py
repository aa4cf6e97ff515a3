"""The loss of retaining heads as one module for `deepspeed.initialize`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, smooth_l1_loss

from apb_ds.compressors.retaining_heads import RetainingHeads
from apb_ds.training.heads.labels import LabelKind, View, label_tokens, make_view
from apb_ds.training.heads.observe import observe_layers


class HeadsLoss(nn.Module):
    """Heads, which are trained, and the frozen model whose attention they predict.

    Parameters
    ----------
    model : transformers PreTrainedModel
    heads : RetainingHeads
    kind : LabelKind
    smoothing : float
        Factor of the smoothing term.
    hosts : int or None
        See `make_view`.
    """

    def __init__(
        self, model: Any, heads: RetainingHeads, kind: LabelKind, smoothing: float, hosts: int | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kind = kind
        self.smoothing = smoothing
        self.hosts = hosts
        self._model = (model,)  # hidden from torch: the model is not trained, cast, sent or saved

    @property
    def model(self) -> Any:
        return self._model[0]

    def forward(self, input_ids: Tensor, is_observer: Tensor, num_document: Tensor) -> Tensor:
        """Return each conversation's loss.

        Parameters
        ----------
        input_ids : (conversations, tokens), int64, padded at the end
        is_observer : (conversations, tokens), bool: whose queries observe the document
        num_document : (conversations,), int64: number of tokens, from the first, that are the document

        Returns
        -------
        Tensor, (conversations,), float32: SmoothL1 over tokens, KV heads and layers, plus `smoothing` times the sum
        over layers of the mean squared difference between neighbouring tokens' scores
        """
        rows = zip(input_ids, is_observer, num_document.tolist(), strict=True)
        return torch.stack([self._loss(ids, observers, length) for ids, observers, length in rows])

    def view(self, is_observer: Tensor, num_document: int) -> View:
        """Return which tokens observe which others in one conversation."""
        return make_view(is_observer.nonzero(as_tuple=True)[0], num_document, self.hosts)

    def layer_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return one layer's share of the loss; `scores` and `labels` are (tokens, kv_heads), float32."""
        loss = smooth_l1_loss(scores, labels) / len(self.heads.layers)
        if len(scores) > 1:
            loss = loss + self.smoothing * mse_loss(scores[1:], scores[:-1])
        return loss

    def _loss(self, ids: Tensor, is_observer: Tensor, num_document: int) -> Tensor:
        view = self.view(is_observer, num_document)
        losses = []

        def observe(
            layer_idx: int, projections: Tensor, queries: Tensor, keys: Tensor, scale: float, values: Tensor
        ) -> None:
            labels = label_tokens(self.kind, view, queries, keys, scale, values)
            with torch.enable_grad():
                scores = self.heads(layer_idx, projections[: view.num_scored]).float()
                losses.append(self.layer_loss(scores, labels))

        observe_layers(self.model, ids[: int(view.rows[-1]) + 1].unsqueeze(0), observe)
        return torch.stack(losses).sum()
