"""Validate what the engine is asked, on every rank, before anything is sent.

A `Validator` turns arguments into a `PrefillRequest` or `QueryRequest`, or raises ValueError. Both carry the facts that
all ranks must share; see `apb_ds.parallel.consistency`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.attention import APBAttention
from apb_ds.config import APBConfig
from apb_ds.engine.context import Branch, Context
from apb_ds.engine.generation_settings import check_generate_arguments, count_new_tokens
from apb_ds.hf.adapters import adapters_in_force, check_adapters
from apb_ds.hf.architecture import check_positions
from apb_ds.hf.rotary import check_reach
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import FORWARD_TOKENS, Plan, plan_request


@dataclass(frozen=True)
class PrefillRequest:
    """A valid prefill.

    Attributes
    ----------
    document_ids, query_ids : (1, tokens), int64, on the engine's device
    plan : how the document is split
    attention : the layer with the settings of the time
    max_positions : positions that the context must serve
    facts : what all ranks must share
    """

    document_ids: Tensor
    query_ids: Tensor | None
    plan: Plan
    attention: APBAttention
    max_positions: int
    facts: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class QueryRequest:
    """A valid query.

    Attributes
    ----------
    ids : (1, q), int64, on the engine's device
    source : the context to answer from, or the prefill that makes it
    num_new : tokens to generate at most
    arguments : of transformers' `generate`
    append : whether the context keeps query and answer
    seed : of the answer's random generator, or None for torch's global one
    facts : what all ranks must share
    """

    ids: Tensor
    source: Context | Branch | PrefillRequest
    num_new: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    append: bool = False
    seed: int | None = None
    facts: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class GenerateCall:
    """The arguments of `APBEngine.generate`, as they were given."""

    document_ids: Any
    query_ids: Any
    max_new_tokens: int | None
    context: Any
    append: bool
    seed: int | None
    arguments: dict[str, Any]


def _check_is_usable(context: object) -> None:
    if not isinstance(context, (Context, Branch)):
        got = type(context).__name__
        raise ValueError(f"context must be what engine.prefill(...) or its branch() returned, got {got}.")
    context.check_usable()


class Validator:
    """Validates requests against a model, settings and a group; bad input is a ValueError. It sends nothing.

    Parameters
    ----------
    module : the engine's model
    config, attention : the settings in force and the layer built from them
    group : the ranks that share a request
    """

    def __init__(
        self,
        module: PreTrainedModel,
        config: APBConfig,
        attention: APBAttention,
        group: SequenceGroup,
    ) -> None:
        self._module = module
        self._config = config
        self._attention = attention
        self._group = group

    def prefill(self, document_ids: Tensor, query_ids: Tensor | None, max_positions: int | None) -> PrefillRequest:
        """Validate `APBEngine.prefill`'s arguments."""
        document_ids = check_ids(self._module, "document_ids", document_ids)
        num_query = 0
        if query_ids is not None:
            query_ids = check_ids(self._module, "query_ids", query_ids)
            num_query = query_ids.shape[1]
        num_tokens = document_ids.shape[1]
        plan = self.plan(num_tokens, num_query)
        if self._attention.needs_query and num_query == 0 and not plan.exact:
            raise ValueError(f"compressor={self._config.compressor!r} needs query_ids at prefill; it scores with them.")
        max_positions = max(max_positions or 0, num_tokens + num_query)
        check_positions(self._module, max_positions)
        facts = settings_facts(self._config)
        facts |= {"document_ids": document_ids, "query_ids": query_ids, "max_positions": max_positions}
        if self._attention.group is self._group:  # stages may have other adapters than each other
            facts |= {"adapters": adapters_in_force(self._module)}
        return PrefillRequest(document_ids, query_ids, plan, self._attention, max_positions, facts)

    def plan(self, num_tokens: int, num_query: int) -> Plan:
        """Return how a document is split; see `plan_request`."""
        # Stages of a pipeline compute different rounds at a time, so there should be several.
        is_staged = self._attention.group is not self._group
        forward_tokens = None if self._module.device.type == "cpu" or is_staged else FORWARD_TOKENS
        return plan_request(self._config, num_tokens, num_query, self._attention.group.world_size, forward_tokens)

    def generate(self, call: GenerateCall) -> QueryRequest:
        """Validate `APBEngine.generate`'s arguments."""
        self._check_form(call)
        arguments = check_generate_arguments(self._module, call.arguments)
        query_ids = check_ids(self._module, "query_ids", call.query_ids)
        check_seed(call.seed)
        given = {"append": call.append, "seed": call.seed}
        if call.context is None:
            document_ids = check_ids(self._module, "document_ids", call.document_ids)
            known = document_ids.shape[1] + query_ids.shape[1]
            num_new = count_new_tokens(self._module, call.max_new_tokens, arguments, known)
            prefill = self.prefill(document_ids, query_ids, known + num_new)
            facts = {**prefill.facts, "max_new_tokens": num_new} | given
            return QueryRequest(query_ids, prefill, num_new, arguments, call.append, call.seed, facts)
        if call.append and isinstance(call.context, Branch) and call.context.is_busy:
            raise ValueError("context is a branch to which another request appends; wait until that has ended.")
        known = call.context.num_tokens + query_ids.shape[1]
        num_new = count_new_tokens(self._module, call.max_new_tokens, arguments, known)
        self._check_context(call.context, known + num_new)
        facts = self._query_facts(query_ids, call.context, num_new) | given
        return QueryRequest(query_ids, call.context, num_new, arguments, call.append, call.seed, facts)

    def all_logits(self, queries: Sequence[Tensor], contexts: Sequence[Context | Branch]) -> list[QueryRequest]:
        """Validate `APBEngine.query_logits`'s arguments, as lists."""
        if len(contexts) != len(queries):
            raise ValueError(f"context has {len(contexts)} contexts for {len(queries)} queries; give one, or as many.")
        requests = []
        for index, (query_ids, context) in enumerate(zip(queries, contexts, strict=True)):
            _check_is_usable(context)
            name = "query_ids" if len(queries) == 1 else f"query_ids[{index}]"
            ids = check_ids(self._module, name, query_ids)
            self._check_context(context, context.num_tokens + ids.shape[1])
            requests.append(QueryRequest(ids, context, facts=self._query_facts(ids, context, 0)))
        return requests

    def _check_form(self, call: GenerateCall) -> None:
        """Raise ValueError unless the call is in one of `generate`'s forms."""
        if not isinstance(call.append, bool):
            raise ValueError(f"append={call.append!r} must be True or False.")
        if call.context is not None:
            _check_is_usable(call.context)
        if call.query_ids is None:
            raise ValueError("query_ids is missing: the tokens after the document, at least one.")
        if (call.context is None) == (call.document_ids is None):
            raise ValueError("give document_ids, or context=engine.prefill(document_ids), and not both.")
        if call.append and call.context is None:
            raise ValueError("append=True keeps the turn in a context; pass context=engine.prefill(...).")

    def _check_context(self, context: Context | Branch, num_positions: int) -> None:
        if context.model is not self._module or context.group != self._group:
            raise ValueError("context belongs to another engine: its keys and values are another model's or group's.")
        check_adapters(self._module, context.adapters)
        check_reach(self._module, context.max_positions, num_positions)

    def _query_facts(self, query_ids: Tensor, context: Context | Branch, num_new: int) -> dict[str, Any]:
        return {"query_ids": query_ids, "max_new_tokens": num_new, "context": context.facts}


def check_seed(seed: int | None) -> None:
    """Raise ValueError unless a random generator takes the seed, or there is none."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1, or None.")


def settings_facts(config: APBConfig) -> dict[str, Any]:
    """Return settings that all ranks must share, by name. A ratio of 8 and one of 8.0 are the same."""
    settings = config.resolved()
    if settings["compression_ratio"] is not None:
        settings["compression_ratio"] = float(settings["compression_ratio"])
    return {f"method.{name}": value for name, value in settings.items()}


def check_ids(model: PreTrainedModel, name: str, ids: Tensor | None) -> Tensor:
    """Return a copy of the ids on the model's device.

    Raises
    ------
    ValueError
        Naming `name`, unless they are int64, (1, tokens) with at least one token, and in the model's vocabulary.
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
            f"{name} has token ids from {lowest} to {highest}; the model's vocabulary is 0 to {vocabulary - 1}. "
            "Does the tokenizer belong to this model?"
        )
    return ids.to(next(model.parameters()).device, copy=True)  # the caller may change its own later
