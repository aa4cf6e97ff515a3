"""Ranks that do not agree are told so before they work together: what differs, and which rank has what.

Ranks that were started with other settings, tokens, weights or versions would hang in a collective, or answer wrongly.
So each call begins with one small exchange, a digest of what every rank must have; only where digests differ do the
ranks also exchange what is behind them. A group of one rank digests nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from apb_ds.parallel.groups import SequenceGroup
from apb_ds.utils.versions import source_digest, versions

SHOWN = 3  # differences in a message
SHOWN_IDS = 4  # at either end
SHOWN_CHARACTERS = 160
REFUSED = "refused"  # the fact of a rank whose input is bad
CHECKSUM_COLUMNS = 1024  # words
CHECKSUM_FACTOR = 0x2545F4914F6CDD1D
WORD_BYTES = 8

Facts = Mapping[str, Any]
Result = TypeVar("Result")


def agree(
    group: SequenceGroup,
    what: str,
    check: Callable[[], Result],
    facts: Callable[[Result], Facts],
    device: torch.device | None = None,
) -> tuple[Result, str]:
    """Check input on every rank, then that all ranks have the same. All ranks of the group call this together.

    Parameters
    ----------
    what : what is being done, such as ``prefill``; ranks that do different things do not agree
    check : returns this rank's input, or raises ValueError; sends nothing
    facts : of that input, what all ranks must have in common, as JSON values by name; not asked of a rank alone
    device : where a collective's tensors must be; by default where the group's objects travel

    Returns
    -------
    the input, and a digest of the facts (empty on a rank alone)

    Raises
    ------
    ValueError
        On every rank: this rank's own, the first that another rank had, or one that says what differs.
    """
    if group.world_size == 1:
        return check(), ""
    failure: ValueError | None = None
    result: Result | None = None
    try:
        result = check()
        mine: dict[str, Any] = {"call": what, **facts(result)}
    except ValueError as error:
        failure = error
        mine = {"call": what, REFUSED: str(error)}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).digest()
    if not group.is_same(digest, device):
        difference = describe(group.gather_objects(mine))
        raise failure or ValueError(difference)
    if failure is not None:
        raise failure
    return result, digest.hex()  # type: ignore[return-value]


def describe(everyone: list[dict[str, Any]]) -> str:
    """Return what differs between the facts of the ranks, in rank order, and which rank has what."""
    refused = next(((rank, facts[REFUSED]) for rank, facts in enumerate(everyone) if REFUSED in facts), None)
    if refused is not None:
        return f"rank {refused[0]}: {refused[1]}"
    names = list(dict.fromkeys(name for facts in everyone for name in facts))
    differing = [name for name in names if any(facts.get(name) != everyone[0].get(name) for facts in everyone)]
    parts = []
    for name in differing[:SHOWN]:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            ranks.setdefault(_shown(facts[name]) if name in facts else "missing", []).append(rank)
        parts.append(f"{name} is " + ", ".join(f"{value} on {_ranks(held)}" for value, held in ranks.items()))
    more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return f"the ranks do not agree: {'; '.join(parts)}{more}. Start every rank with the same."


def describe_ids(ids: Tensor | None) -> str | None:
    """Return token ids, (1, tokens) on any device, as their number, both ends and a checksum of all of them.

    The sum is made where the ids are: a long document's would take longer to fetch and hash than its first layer.
    """
    if ids is None:
        return None
    values, num_tokens = ids.detach()[0], ids.shape[1]
    ends = values if num_tokens <= 2 * SHOWN_IDS else torch.cat([values[:SHOWN_IDS], values[-SHOWN_IDS:]])
    *listed, rows, columns = torch.cat([ends, checksum(values)]).tolist()
    first, last = " ".join(map(str, listed[:SHOWN_IDS])), " ".join(map(str, listed[SHOWN_IDS:]))
    shown = f"{listed}" if num_tokens <= 2 * SHOWN_IDS else f"{first} ... {last}"
    return f"{num_tokens} tokens {shown} (sums {_hexadecimal(rows)} {_hexadecimal(columns)})"


def describe_software() -> dict[str, str | None]:
    """Return the versions that ranks must share. Python's counts without its last number."""
    found = versions()
    found["python"] = str(found["python"]).rpartition(".")[0]
    return {f"version of {name}": version for name, version in found.items()} | {"source of apb_ds": source_digest()}


def describe_model(model: nn.Module) -> dict[str, str]:
    """Return class, config and weights of a transformers model, by name.

    Each tensor is told by its dtype, shape and two sums of its bits, taken as 64-bit integers along rows and along
    columns of a table and weighted by position. Integer sums have no rounding: they are the same on every device and
    for any number of threads. They catch a value that differs in one bit, and values, rows or columns in another order;
    not weights that somebody built to have the same sums.
    """
    config: Any = getattr(model, "config", None)
    values = {} if config is None else config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation"):  # places, and what is said elsewhere
        values.pop(name, None)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    found = {"class of the model": type(model).__name__, "dtype of the model": ", ".join(dtypes)}
    found |= {f"config.{name}": json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    seen: dict[tuple[int, ...], str] = {}
    sums: list[tuple[str, Tensor]] = []
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.numel())
        if seen.setdefault(place, name) == name or tensor.numel() == 0:  # tied weights are summed once
            sums.append((f"weights {name}", tensor))
    checksums = torch.stack([checksum(tensor) for _, tensor in sums]).tolist() if sums else []
    for (name, tensor), pair in zip(sums, checksums, strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        hexadecimal = "".join(map(_hexadecimal, pair))
        found[name] = f"{dtype} {tuple(tensor.shape)} {hexadecimal}"
    return found


def checksum(tensor: Tensor) -> Tensor:
    """Return two int64 sums of the tensor's bits, (2,), on its device; see `describe_model`."""
    data = tensor.detach().contiguous().flatten()
    if data.numel() == 0:
        return torch.zeros(2, dtype=torch.int64, device=tensor.device)
    if data.storage_offset() * data.element_size() % WORD_BYTES:  # a view of words must begin where one does
        data = data.clone()
    data = data.view(torch.uint8)
    whole = data.numel() // (WORD_BYTES * CHECKSUM_COLUMNS) * WORD_BYTES * CHECKSUM_COLUMNS
    table = data[:whole].view(torch.int64).view(-1, CHECKSUM_COLUMNS)
    rows, columns = table.sum(dim=1), table.sum(dim=0)
    tail = _weighted(data[whole:].to(torch.int64))
    return torch.stack([_weighted(rows) + tail, _weighted(columns) + tail])


def _weighted(numbers: Tensor) -> Tensor:
    """Return the sum of int64 numbers, each times a weight of its position, modulo 2^64."""
    positions = torch.arange(1, numbers.numel() + 1, dtype=torch.int64, device=numbers.device)
    weights = positions * CHECKSUM_FACTOR
    weights = (weights ^ (weights >> 29)) | 1  # odd, so that no difference is lost
    return (numbers * weights).sum()


def _hexadecimal(number: int) -> str:
    """Return a signed 64-bit number's bits."""
    return f"{number & (2**64 - 1):016x}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
