"""Consistency checks: before ranks work together, they compare what they were given.

Ranks with different settings, tokens, weights or versions would hang in a collective or answer wrongly. So each call
starts with one small exchange: every rank sends a digest of its facts. Only if the digests differ do the ranks exchange
the facts themselves, to say what differs and where. A group of one rank computes no digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from apb_ds.parallel.groups import SequenceGroup
from apb_ds.utils.versions import source_digest, versions

SHOWN_DIFFERENCES = 3
SHOWN_IDS = 4  # at either end
SHOWN_CHARACTERS = 160
REFUSAL = "refusal"  # the fact that a rank sends if its input is bad
CHECKSUM_COLUMNS = 1024  # words
CHECKSUM_FACTOR = 0x2545F4914F6CDD1D
WORD_BYTES = 8


@dataclass
class Comparison:
    """What this rank compares with the others.

    Attributes
    ----------
    facts : by name: JSON values, token ids of shape (1, tokens), modules
    digest : of the facts, once all ranks have the same; empty for a group of one rank
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""


@contextmanager
def shared_validation(group: SequenceGroup, call: str, device: torch.device | None = None) -> Iterator[Comparison]:
    """Validate input on every rank, then compare its facts. All ranks of the group enter this together.

    The body validates and sets the facts; it must not communicate. A rank whose body raises ValueError or
    RuntimeError still joins the exchange, so that no rank waits for it::

        with shared_validation(group, "prefill", device) as comparison:
            request = validate(document_ids)
            comparison.facts = {"document_ids": request.document_ids}

    Parameters
    ----------
    call : what the ranks are about to do; it must be the same on all of them
    device : where a collective's tensors must be; by default objects are exchanged

    Raises
    ------
    ValueError
        On every rank: its own, else that of the first rank that has one, else which facts differ.
    """
    comparison = Comparison()
    if group.world_size == 1:
        yield comparison
        return
    failure: ValueError | RuntimeError | None = None
    try:
        yield comparison
    except (ValueError, RuntimeError) as error:  # RuntimeError: a missing package, memory that ran out
        failure = error
    facts = _described(comparison.facts) if failure is None else {REFUSAL: str(failure)}
    mine = {"call": call, **facts}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).digest()
    if not group.is_same(digest, device):
        difference = describe_difference(group.gather_objects(mine))
        raise failure or ValueError(difference)
    if failure is not None:
        raise failure
    comparison.digest = digest.hex()


@contextmanager
def shared_outcome(group: SequenceGroup) -> Iterator[None]:
    """Do something on every rank that may fail on any of them, without communicating; then all ranks fail, or none.

    Raises
    ------
    Exception
        On a rank that failed its own error; on the others a ValueError, OSError or RuntimeError that names the rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    kind = next((kind for kind in (ValueError, OSError) if isinstance(failure, kind)), RuntimeError)
    outcomes = group.gather_objects(None if failure is None else (kind, str(failure) or type(failure).__name__))
    if failure is not None:
        raise failure
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            of_kind, message = outcome
            raise of_kind(f"rank {rank}: {message}")


def describe_difference(by_rank: list[dict[str, Any]]) -> str:
    """Return the first refusal, else the facts that differ and which rank has what."""
    for rank, facts in enumerate(by_rank):
        if REFUSAL in facts:
            return f"rank {rank}: {facts[REFUSAL]}"
    names = dict.fromkeys(name for facts in by_rank for name in facts)
    differing = [name for name in names if any(facts.get(name) != by_rank[0].get(name) for facts in by_rank)]
    parts = []
    for name in differing[:SHOWN_DIFFERENCES]:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(by_rank):
            ranks.setdefault(_shown(facts[name]) if name in facts else "missing", []).append(rank)
        parts.append(f"{name} is " + ", ".join(f"{value} on {_ranks(held)}" for value, held in ranks.items()))
    more = f"; and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
    return f"the ranks differ: {'; '.join(parts)}{more}. Start every rank with the same settings, input and software."


def _described(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts as JSON values."""
    described: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, nn.Module):
            described |= {f"{name}: {part}": text for part, text in describe_model(value).items()}
        else:
            described[name] = describe_ids(value) if isinstance(value, Tensor) else value
    return described


def describe_ids(ids: Tensor) -> str:
    """Return how many token ids there are, both ends, and a checksum of all; the ids are (1, tokens), on any device.

    The checksum is computed on the ids' device: fetching and hashing a long document would take longer than its first
    layer.
    """
    values, num_tokens = ids.detach()[0], ids.shape[1]
    ends = values if num_tokens <= 2 * SHOWN_IDS else torch.cat([values[:SHOWN_IDS], values[-SHOWN_IDS:]])
    *listed, rows, columns = torch.cat([ends, checksum(values)]).tolist()
    first, last = " ".join(map(str, listed[:SHOWN_IDS])), " ".join(map(str, listed[SHOWN_IDS:]))
    shown = f"{listed}" if num_tokens <= 2 * SHOWN_IDS else f"{first} ... {last}"
    return f"{num_tokens} tokens {shown} (sums {_hexadecimal(rows)} {_hexadecimal(columns)})"


def describe_software() -> dict[str, str | None]:
    """Return the versions that all ranks must share; Python's without the patch number."""
    found = versions()
    found["python"] = str(found["python"]).rpartition(".")[0]
    return {f"version of {name}": version for name, version in found.items()} | {"source of apb_ds": source_digest()}


def describe_model(
    model: nn.Module, elsewhere: Mapping[str, Callable[[], Tensor] | None] = MappingProxyType({})
) -> dict[str, str]:
    """Return a module's class, dtype, config (if it has one) and weights, by name.

    A tensor is described by its dtype, its shape and two checksums: its bits, read as a table of 64-bit integers, are
    summed along rows and along columns, weighted by position. Integer sums do not round, so they are the same on every
    device and for any number of threads. They detect a single flipped bit and any reordering of values, rows or
    columns; they do not detect weights constructed to collide.

    Parameters
    ----------
    elsewhere : by name, what returns a tensor in place of the one that the module has; None to leave it out
    """
    config: Any = getattr(model, "config", None)
    values = {} if config is None else config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation"):  # paths, and what other facts cover
        values.pop(name, None)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    found = {"class": type(model).__name__, "dtype": ", ".join(dtypes)}
    found |= {f"config.{name}": json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    seen: dict[tuple[int, ...], str] = {}
    sums: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        get = elsewhere.get(name, lambda tensor=tensor: tensor)
        storage = (tensor.data_ptr(), tensor.numel())
        # Tied weights are summed once.
        if get is not None and (seen.setdefault(storage, name) == name or tensor.numel() == 0):
            whole = get()
            dtype = str(whole.dtype).removeprefix("torch.")
            sums[f"weights {name}"] = f"{dtype} {tuple(whole.shape)}", checksum(whole)
    checksums = torch.stack([pair for _, pair in sums.values()]).tolist() if sums else []
    for (name, (shape, _)), pair in zip(sums.items(), checksums, strict=True):
        found[name] = f"{shape} {''.join(map(_hexadecimal, pair))}"
    return found


def checksum(tensor: Tensor) -> Tensor:
    """Return two int64 checksums of the tensor's bits, (2,), on its device; see `describe_model`."""
    data = tensor.detach().contiguous().flatten()
    if data.numel() == 0:
        return torch.zeros(2, dtype=torch.int64, device=tensor.device)
    if data.storage_offset() * data.element_size() % WORD_BYTES:  # a view as words must start on a word boundary
        data = data.clone()
    data = data.view(torch.uint8)
    whole = data.numel() // (WORD_BYTES * CHECKSUM_COLUMNS) * WORD_BYTES * CHECKSUM_COLUMNS
    table = data[:whole].view(torch.int64).view(-1, CHECKSUM_COLUMNS)
    rows, columns = table.sum(dim=1), table.sum(dim=0)
    tail = _weighted(data[whole:].to(torch.int64))
    return torch.stack([_weighted(rows) + tail, _weighted(columns) + tail])


def _weighted(numbers: Tensor) -> Tensor:
    """Return the sum of int64 numbers, each weighted by its position, modulo 2^64."""
    positions = torch.arange(1, numbers.numel() + 1, dtype=torch.int64, device=numbers.device)
    weights = positions * CHECKSUM_FACTOR
    weights = (weights ^ (weights >> 29)) | 1  # odd: multiplying by it loses no bit
    return (numbers * weights).sum()


def _hexadecimal(number: int) -> str:
    """Return the bits of a signed 64-bit number."""
    return f"{number & (2**64 - 1):016x}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
