"""What the engine's methods do when they are given lists: many queries, answered in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apb_ds.engine.batch import MAX_SEQUENCES
from apb_ds.engine.sequences import Cancelled, Handle
from apb_ds.engine.validation import QueryRequest

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine


def generate_all(
    engine: APBEngine,
    queries: Sequence[Tensor],
    contexts: Any,
    documents: Any,
    settings: Sequence[Mapping[str, Any]] | None,
    refused: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> list[Tensor | BaseException]:
    """Answer many queries, as `APBEngine.generate` does with lists.

    Parameters
    ----------
    refused : arguments that lists do not go with
    arguments : of every query
    """
    if queries and not any(isinstance(query_ids, Tensor) for query_ids in queries):
        raise ValueError(
            "query_ids must be an int64 tensor of shape (1, tokens) or a list of such tensors, got a list of "
            f"{type(queries[0]).__name__}."
        )
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name} goes with a single query, not with a list of them.")
    if arguments.get("streamer") is not None and len(queries) > 1:
        raise ValueError("streamer would get the tokens of all queries; give each its own in settings.")
    lists: dict[str, Any] = {"context": contexts, "document_ids": documents}
    for name, value in (*lists.items(), ("settings", settings)):
        if name == "settings" and value is not None and not isinstance(value, (list, tuple)):
            raise ValueError(f"settings must be a list of mappings, one for each query, got {type(value).__name__}.")
        if isinstance(value, (list, tuple)) and len(value) != len(queries):
            raise ValueError(f"{name} has {len(value)} entries for {len(queries)} queries; give one for each.")
    for index, own in enumerate(settings or ()):
        if not isinstance(own, Mapping) or {"query_ids", *lists} & own.keys():
            raise ValueError(f"settings[{index}] must hold a query's own arguments by name, without ids and context.")
    handles: list[Handle | BaseException] = []
    with engine.batch(min(MAX_SEQUENCES, max(1, len(queries)))) as batch:
        for index, query_ids in enumerate(queries):
            given = {name: value[index] if isinstance(value, (list, tuple)) else value for name, value in lists.items()}
            own = {} if settings is None else settings[index]
            try:
                handles.append(batch.submit(query_ids, **given, **{**arguments, **own}))
            except ValueError as error:
                handles.append(error)
        failure: BaseException | None = None
        try:
            batch.run()
        except Exception as error:
            if engine.group.world_size > 1:
                raise  # the others are in its collectives
            failure = error
        engine.stats = batch.stats
    return [_outcome(handle, failure, engine.device) for handle in handles]


def _outcome(
    handle: Handle | BaseException, failure: BaseException | None, device: torch.device
) -> Tensor | BaseException:
    """Return a request's answer or why it has none: if the batch failed before it ended, for that reason."""
    if isinstance(handle, BaseException):
        return handle
    if isinstance(handle.error, Cancelled) and failure is not None:
        return failure
    return handle.error or handle.result().to(device)


def answer_alone(engine: APBEngine, request: QueryRequest) -> Tensor:
    """Answer one valid request about a branch: (1, new_tokens), int64."""
    with engine.batch(1) as batch:
        handle = batch.add(request)
        batch.run()
        engine.stats = batch.stats
    return handle.result().to(engine.device)
