"""What the first rank tells all ranks to do, in order; see `apb_ds.serving.worker`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefill:
    """Prefill a document. ids: (1, n), int64, on the CPU."""

    key: str
    ids: Tensor = field(repr=False)
    max_positions: int


@dataclass(frozen=True, eq=False)
class Ask:
    """Answer a prompt.

    Attributes
    ----------
    number : of the request
    key : of its document; empty for a short prompt
    ids : (1, tokens), int64, on the CPU: what follows document and conversation, or the whole short prompt
    num_new : tokens to generate at most
    conversation : in which the turn is kept, and which may have turns already; None for a short prompt
    seed : of its random generator
    """

    number: int
    key: str
    ids: Tensor = field(repr=False)
    num_new: int
    conversation: int | None
    seed: int


@dataclass(frozen=True)
class Forget:
    """Free a conversation's turns."""

    conversation: int


@dataclass(frozen=True)
class ToHost:
    """Move a document to host memory."""

    key: str


@dataclass(frozen=True)
class ToDisk:
    """Write a document to disk, and forget it.

    Attributes
    ----------
    has_file : whether it is on disk already
    """

    key: str
    has_file: bool = False


@dataclass(frozen=True)
class ToDevice:
    """Bring a document back from host memory, or from disk."""

    key: str
    from_disk: bool


@dataclass(frozen=True)
class Drop:
    """Forget a document, wherever it is."""

    key: str


@dataclass(frozen=True)
class DropFile:
    """Remove a document from disk; it stays in memory."""

    key: str


@dataclass(frozen=True)
class Abandon:
    """End the prefill that is under way.

    Attributes
    ----------
    write : end the writing of a document instead
    """

    write: bool = False


@dataclass(frozen=True)
class Stop:
    """Leave the loop."""


Command = Prefill | Ask | Forget | ToHost | ToDisk | ToDevice | Drop | DropFile | Abandon | Stop
