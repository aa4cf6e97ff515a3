"""`APBEngine.generate` as transformers' is called: rows of ids, perhaps padded, that hold document and query."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apb_ds.engine.calls import ended_after_errors, exclusive_call
from apb_ds.engine.generation_settings import count_new_tokens, end_tokens, padding_token
from apb_ds.engine.split import Split
from apb_ds.engine.validation import check_ids
from apb_ds.parallel.consistency import shared_validation

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine

logger = logging.getLogger(__name__)


def answer_prompts(
    engine: APBEngine, given: Mapping[str, Any], query_length: int | None, arguments: dict[str, Any]
) -> Tensor:
    """Answer prompts as transformers' `generate` does: (rows, tokens + new_tokens), int64, padded on the right.

    Parameters
    ----------
    given : what `generate` was given for ids and context, by name
    query_length : how many of a prompt's last ids are the query; None to cut it as the engine's `split` says
    arguments : all other ones of `APBEngine.generate`
    """
    streamer = arguments.get("streamer") if engine.group.is_first else None
    mask = arguments.pop("attention_mask", None)
    with exclusive_call(engine.module):
        with (
            ended_after_errors(streamer),
            shared_validation(engine.group, "generate", engine.device) as comparison,
        ):
            name, ids = _prompts_of(given)
            num_padded = _count_padding(engine, name, ids, mask, arguments)
            names = [name] if len(ids) == 1 else [f"{name}[{row}]" for row in range(len(ids))]
            rows = [
                check_ids(engine.module, name, row[num:].unsqueeze(0))
                for name, row, num in zip(names, ids, num_padded, strict=True)
            ]
            lengths = [_document_length(engine.split, *row, query_length) for row in zip(names, rows, strict=True)]
            num_new = count_new_tokens(engine.module, arguments.pop("max_new_tokens"), arguments, ids.shape[1])
            comparison.facts = {name: ids.reshape(1, -1), "padding": num_padded, "document lengths": lengths}
        if query_length is None and engine.group.is_first:
            _tell(engine, rows[0].shape[1], lengths[0])
        # Without a document, the first token stands for one: such a prompt runs exact, as one forward.
        documents = [ids[:, : length or 1] for ids, length in zip(rows, lengths, strict=True)]
        queries = [ids[:, length or 1 :] for ids, length in zip(rows, lengths, strict=True)]
        arguments = {**arguments, "max_new_tokens": num_new}
        if len(rows) == 1 and lengths[0]:
            answers = [engine.generate(documents[0], queries[0], **arguments)]
        else:
            answers = engine.generate(documents, queries, **arguments)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        longest = max(answer.shape[1] for answer in answers)
        tokens = answers[0].new_full((len(rows), longest), padding_token(engine.module, arguments) or 0)
        for row, answer in zip(tokens, answers, strict=True):
            row[: answer.shape[1]] = answer[0]
        return torch.cat([ids.to(tokens.device), tokens], dim=-1)


def _prompts_of(given: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Return the one argument that holds prompts, with its name."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1 or not found.keys() <= {"input_ids", "inputs", "document_ids"}:
        raise ValueError(
            "give document_ids and query_ids; or query_ids and context; or input_ids alone, which hold both, with "
            f"query_length or without it; not {', '.join(found) or 'none of them'}."
        )
    ((name, ids),) = found.items()
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or len(ids) == 0:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} without query_ids must be an int64 tensor of shape (rows, tokens), got {got}.")
    return name, ids


def _count_padding(
    engine: APBEngine, name: str, ids: Tensor, mask: Tensor | None, arguments: dict[str, Any]
) -> list[int]:
    """Return by how many ids each row is padded on its left.

    Without a mask, leading padding tokens are hidden as transformers does it: unless they end answers, too.
    """
    if mask is None:
        token = padding_token(engine.module, arguments)
        if token is None or token in end_tokens(engine.module, arguments):
            return [0] * len(ids)
        return _leading(ids == token)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"attention_mask must hold zeros and ones for {name}, of shape {tuple(ids.shape)}.")
    num_padded = _leading(mask == 0)
    for row, (hidden, num) in enumerate(zip((mask == 0).sum(dim=1).tolist(), num_padded, strict=True)):
        if hidden > num:
            where = "the right" if not bool(mask[row, -1]) else "tokens between others"
            raise ValueError(
                f"attention_mask hides {where} of row {row}; only padding on the left can be taken off. Set the "
                'tokenizer\'s padding_side = "left".'
            )
    return num_padded


def _leading(hidden: Tensor) -> list[int]:
    """Return how many of each row's first places are true."""
    return [int(count) for count in hidden.long().cumprod(dim=1).sum(dim=1).tolist()]


def _document_length(split: Split, name: str, ids: Tensor, query_length: int | None) -> int:
    """Return how many ids of a prompt, (1, tokens), are its document, 0 for none."""
    num_tokens = ids.shape[1]
    if query_length is None:
        if num_tokens < 2:
            raise ValueError(f"{name} has one token; a prompt must have two at least.")
        return split.document_length(ids[0].tolist())
    if isinstance(query_length, bool) or not isinstance(query_length, int) or not 1 <= query_length < num_tokens:
        raise ValueError(
            f"query_length={query_length!r} must say how many of the last {name} are the query: from 1 to "
            f"{num_tokens - 1} of these {num_tokens} tokens."
        )
    return num_tokens - query_length


def _tell(engine: APBEngine, num_tokens: int, length: int) -> None:
    """Log once how a prompt with a document was cut, and once that one has none."""
    if (length > 0) in engine._told_split:
        return
    engine._told_split.add(length > 0)
    if length:
        logger.warning(
            "no query_length was given: of %d tokens the last %d are taken for the query, the others for the document. "
            "The engine's split says where prompts are cut (apb_ds.Split).",
            num_tokens,
            num_tokens - length,
        )
    else:
        logger.warning(
            "a prompt of %d tokens has no document, which begins at %d (the split's min_document): it runs exact.",
            num_tokens,
            engine.split.min_document,
        )
