"""The loss over a model's answers only: no other token's logits are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class AnswerLoss(nn.Module):
    """A decoder with adapters and its loss, as one module for `deepspeed.initialize`.

    Parameters
    ----------
    model : peft.PeftModel over a transformers PreTrainedModel with a language-modelling head
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, is_answer: Tensor) -> Tensor:
        """Return each conversation's mean cross entropy over its answer tokens: all conversations weigh the same.

        Parameters
        ----------
        input_ids : (conversations, tokens), int64
        is_answer : (conversations, tokens), bool, with at least one in each row

        Returns
        -------
        Tensor, (conversations,), float32
        """
        model = self.model.get_base_model()
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        rows, places = is_answer[:, 1:].nonzero(as_tuple=True)  # of the tokens before answer tokens, which predict them
        logits = model.get_output_embeddings()(hidden[rows, places]).float()
        losses = cross_entropy(logits, input_ids[rows, places + 1], reduction="none")
        total = torch.zeros(len(input_ids), device=losses.device).index_add(0, rows, losses)
        return total / torch.bincount(rows, minlength=len(input_ids))
