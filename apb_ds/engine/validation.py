"""What an engine is asked: checked on every rank, and told in facts that all ranks must have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.attention import APBAttention
from apb_ds.config import APBConfig
from apb_ds.engine.context import Context
from apb_ds.engine.decoding import check_generate_arguments, count_new_tokens
from apb_ds.hf.architecture import check_positions
from apb_ds.hf.rotary import check_reach
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import FORWARD_TOKENS, Plan, plan_request

SHOWN_KEY = 12  # characters of a context's key


@dataclass(frozen=True)
class AskedPrefill:
    """A prefill whose input has been checked.

    Attributes
    ----------
    document_ids, query_ids : (1, tokens), int64, on the engine's device
    plan : how it is done
    max_positions : that the context must serve
    """

    document_ids: Tensor
    query_ids: Tensor | None
    plan: Plan
    max_positions: int


@dataclass(frozen=True)
class AskedQuery:
    """A query whose input has been checked.

    Attributes
    ----------
    ids : (1, q), int64, on the engine's device
    num_new : tokens to generate at most
    arguments : of transformers' `generate`
    prefill : of a document that has no context yet
    """

    ids: Tensor
    num_new: int
    arguments: dict[str, Any]
    prefill: AskedPrefill | None = None


class Asking:
    """Checks requests against a model, settings and a group. Nothing here sends anything; bad input is a ValueError.

    Parameters
    ----------
    module : the engine's model
    config, attention : the settings in force, and the layer made of them
    group : of the ranks that share a request
    """

    def __init__(
        self, module: PreTrainedModel, config: APBConfig, attention: APBAttention, group: SequenceGroup
    ) -> None:
        self._module = module
        self._config = config
        self._attention = attention
        self._group = group

    def prefill(self, document_ids: Tensor, query_ids: Tensor | None, max_positions: int | None) -> AskedPrefill:
        document_ids = check_ids(self._module, "document_ids", document_ids)
        num_query = 0
        if query_ids is not None:
            query_ids = check_ids(self._module, "query_ids", query_ids)
            num_query = query_ids.shape[1]
        num_tokens = document_ids.shape[1]
        forward_tokens = None if self._module.device.type == "cpu" else FORWARD_TOKENS
        plan = plan_request(self._config, num_tokens, num_query, self._group.world_size, forward_tokens)
        if self._attention.needs_query and num_query == 0 and not plan.exact:
            raise ValueError(f"compressor={self._config.compressor!r} needs query_ids at prefill; it scores with them.")
        max_positions = max(max_positions or 0, num_tokens + num_query)
        check_positions(self._module, max_positions)
        return AskedPrefill(document_ids, query_ids, plan, max_positions)

    def prefill_facts(self, asked: AskedPrefill) -> dict[str, Any]:
        """Return what the ranks must have in common before a prefill."""
        settings = {f"method.{name}": value for name, value in self._config.resolved().items()}
        ids = {"document_ids": asked.document_ids, "query_ids": asked.query_ids}
        return {**settings, **ids, "max_positions": asked.max_positions}

    def generate(
        self, given: dict[str, Any], max_new_tokens: int | None, generate_arguments: dict[str, Any]
    ) -> AskedQuery:
        """Return what `generate` is asked; `given` are its arguments that say which document and query."""
        document_ids, query_ids, context = given["document_ids"], given["query_ids"], given["context"]
        if given["input_ids"] is not None:
            if document_ids is not None or query_ids is not None or context is not None:
                raise ValueError("input_ids holds document and query; give it alone, with query_length.")
            document_ids, query_ids = split_query(self._module, given["input_ids"], given["query_length"])
        elif given["query_length"] is not None:
            raise ValueError("query_length belongs to input_ids, which is missing.")
        if query_ids is None:
            raise ValueError("query_ids is missing: the tokens after the document, at least one.")
        if (context is None) == (document_ids is None):
            raise ValueError("give document_ids, or context=engine.prefill(document_ids), and not both.")
        if given["append"] and context is None:
            raise ValueError("append=True keeps the turn in a context; pass context=engine.prefill(...).")
        arguments = check_generate_arguments(self._module, generate_arguments)
        query_ids = check_ids(self._module, "query_ids", query_ids)
        if context is None:
            known = check_ids(self._module, "document_ids", document_ids).shape[1] + query_ids.shape[1]
            num_new = count_new_tokens(self._module, max_new_tokens, arguments, known)
            prefill = self.prefill(document_ids, query_ids, known + num_new)
            return AskedQuery(query_ids, num_new, arguments, prefill)
        self._check_context(context)
        known = context.num_tokens + query_ids.shape[1]
        num_new = count_new_tokens(self._module, max_new_tokens, arguments, known)
        check_reach(self._module, context.max_positions, known + num_new)
        return AskedQuery(query_ids, num_new, arguments)

    def logits(self, query_ids: Tensor, context: Context) -> AskedQuery:
        """Return what `query_logits` is asked."""
        ids = check_ids(self._module, "query_ids", query_ids)
        self._check_context(context)
        check_reach(self._module, context.max_positions, context.num_tokens + ids.shape[1])
        return AskedQuery(ids, 0, {})

    def query_facts(self, asked: AskedQuery, context: Context | None) -> dict[str, Any]:
        """Return what the ranks must have in common before a query. How tokens are drawn is the first rank's affair."""
        if asked.prefill is not None:
            return {**self.prefill_facts(asked.prefill), "max_new_tokens": asked.num_new}
        assert context is not None
        of_context = {"prefill": context.key[:SHOWN_KEY], "tokens": context.num_tokens}
        return {"query_ids": asked.ids, "max_new_tokens": asked.num_new, "context": of_context}

    def _check_context(self, context: Context) -> None:
        if context.model is not self._module or context.group != self._group:
            raise ValueError("context belongs to another engine: its keys and values are another model's or group's.")


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
