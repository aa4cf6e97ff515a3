"""Check a caller's token ids, and part document and query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def check_ids(model: PreTrainedModel, name: str, ids: Tensor) -> Tensor:
    """Return the ids on the model's device.

    Raises
    ------
    ValueError
        Naming `name`, unless they are int64, (1, tokens) with at least one token, and known to the model.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be an int64 tensor of shape (1, tokens), got {got}.")
    if ids.shape[0] != 1:
        raise ValueError(f"{name} has a batch of {ids.shape[0]}; the engine serves one sequence at a time.")
    if ids.shape[1] == 0:
        raise ValueError(f"{name} is empty; it needs at least one token.")
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.num_embeddings
    lowest, highest = torch.stack(torch.aminmax(ids)).tolist()
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"{name} has token ids from {lowest} to {highest}; the model knows 0 to {vocabulary - 1}. "
            "Does the tokenizer belong to this model?"
        )
    return ids.to(next(model.parameters()).device)


def split_query(model: PreTrainedModel, input_ids: Tensor, query_length: int | None) -> tuple[Tensor, Tensor]:
    """Split off the last `query_length` tokens: (1, n) document and (1, query_length) query.

    Raises
    ------
    ValueError
        For bad ids, or a length that leaves document or query empty.
    """
    input_ids = check_ids(model, "input_ids", input_ids)
    if query_length is None or not 1 <= query_length < input_ids.shape[1]:
        raise ValueError(
            f"query_length={query_length!r} must say how many of the last input_ids are the query: from 1 to "
            f"{input_ids.shape[1] - 1} of these {input_ids.shape[1]} tokens."
        )
    return input_ids[:, :-query_length], input_ids[:, -query_length:]
