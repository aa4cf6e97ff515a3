"""A prefilled document, from which queries and conversations are answered."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self
from weakref import WeakSet

from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.attention import APBAttention
from apb_ds.cache import ShardedCache
from apb_ds.engine.calls import exclusive_call
from apb_ds.engine.moved import copy_shards
from apb_ds.engine.saved import save_context
from apb_ds.engine.saved_files import beside
from apb_ds.parallel.consistency import shared_outcome, shared_validation
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan
from apb_ds.suffixes import Prefix, Suffix, SuffixPool

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine

SHOWN_KEY = 12  # characters of a context's key
NOT_PICKLED = (
    "a {} cannot be pickled or saved with torch.save: it holds the engine's model and process group. Save the context "
    "with context.save(path), or prefill the document again."
)
DEVICE, HOST = "device", "host"
PLACES = (DEVICE, HOST)
ON_HOST = "the context is in host memory; call context.to_device() first."
FREED = "context is a branch that was freed; make another with context.branch()."


@dataclass
class Context:
    """A document in the sharded cache of one engine, made by `APBEngine.prefill` or `APBEngine.load_context`.

    Attributes
    ----------
    plan : how the document was split
    cache : this rank's shard
    token_ids : (1, tokens), int64, on the model's device: the document and every turn kept since. The last
        token of a generated turn is not in the cache yet; the next forward feeds it first.
    max_positions : positions that the rotary frequencies were chosen for
    prefill_s : seconds of the prefill on this rank; 0 if it was loaded
    bytes_sent : bytes that this rank sent to others during the prefill
    engine : that made it
    attention : the layer with the settings that it was prefilled with
    key : digest of settings and tokens, the same on every rank; empty for a group of one rank
    adapters : names of the peft adapters that it was prefilled with; only these can answer from it
    place : ``device`` or ``host``: where keys and values are; see `to_host`
    """

    plan: Plan
    cache: ShardedCache = field(repr=False)
    token_ids: Tensor = field(repr=False)
    max_positions: int
    prefill_s: float
    bytes_sent: int
    engine: APBEngine = field(repr=False)
    attention: APBAttention = field(repr=False)
    key: str = ""
    adapters: tuple[str, ...] = ()
    place: str = DEVICE
    _num_branches: int = field(default=0, init=False, repr=False)
    _branches: WeakSet[Branch] = field(default_factory=WeakSet, init=False, repr=False)
    _prefix: Prefix | None = field(default=None, init=False, repr=False)
    _prefixes: WeakSet[Prefix] = field(default_factory=WeakSet, init=False, repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED.format("Context"))

    @property
    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = self.engine.module
        return model

    @property
    def group(self) -> SequenceGroup:
        return self.engine.group

    @property
    def pool(self) -> SuffixPool:
        """The engine's, where branches are stored."""
        return self.engine.pool

    @property
    def num_tokens(self) -> int:
        """Tokens of the document and the turns kept since."""
        return int(self.token_ids.shape[1])

    @property
    def num_cached(self) -> int:
        """Tokens in the cache, over all ranks."""
        return self.cache.get_seq_length()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values on this rank, in whichever place; on a device with spare room for new tokens."""
        return self.cache.num_bytes

    @property
    def facts(self) -> dict[str, Any]:
        """What calls compare between the ranks."""
        return {"prefill": self.key[:SHOWN_KEY], "tokens": self.num_tokens, "place": self.place}

    def check_usable(self) -> None:
        """Raise ValueError while it is in host memory."""
        if self.place == HOST:
            raise ValueError(ON_HOST)

    def to_host(self, *, while_waiting: Callable[[], object] | None = None) -> None:
        """Move keys and values to host memory, which frees the device's. All ranks do so together.

        Until `to_device`, the context cannot be asked, branched or given to a batch; it can be saved. Requests of a
        batch that wait to join end with an error. On CPU nothing moves.

        Parameters
        ----------
        while_waiting : as of `save`

        Raises
        ------
        ValueError
            On every rank, while branches that were not freed, or running requests of a batch, share the document.
        RuntimeError
            On every rank if host memory runs out on one; nothing is changed then.
        """
        with exclusive_call(self.model):
            with shared_validation(self.group, "to_host", self.engine.device) as comparison:
                self._check_unshared()
                comparison.facts = {"context": self.facts}
            if self.place == HOST:
                return
            if self.engine.device.type != "cpu":
                self.cache.forget_unreachable()
                with shared_outcome(self.group):
                    room = self.cache.room_on_host()
                self._move(room, while_waiting)
                if self.engine._recorded is not None:
                    self.engine._recorded.let_go(self.cache)
            self.place = HOST

    def to_device(self, *, while_waiting: Callable[[], object] | None = None) -> None:
        """Move keys and values back to the device, with spare room for new tokens as before. All ranks do so.

        Parameters
        ----------
        while_waiting : as of `save`

        Raises
        ------
        torch.OutOfMemoryError, RuntimeError
            The first on the rank that runs out of memory, the other elsewhere; nothing is changed then.
        """
        with exclusive_call(self.model):
            with shared_validation(self.group, "to_device", self.engine.device) as comparison:
                comparison.facts = {"context": self.facts}
            if self.place == DEVICE:
                return
            if self.engine.device.type != "cpu":
                with shared_outcome(self.group):
                    if self.engine._recorded is not None:
                        self.engine._recorded.lend_buffers(self.cache)
                    room = self.cache.room_on_device(self.engine.device)
                self._move(room, while_waiting)
            self.place = DEVICE

    def _move(self, room: dict[int, tuple[Tensor, Tensor]], while_waiting: Callable[[], object] | None) -> None:
        """Copy keys and values to new tensors, and use these."""
        copy = partial(copy_shards, room, self.cache.shards(), self.engine.device)
        beside(self.group, copy, while_waiting)
        self.cache.use_copies(room)

    def save(self, path: str | os.PathLike[str], *, while_waiting: Callable[[], object] | None = None) -> None:
        """Write the context to a directory, for `APBEngine.load_context`; from either place. All ranks do so together.

        The directory appears once it is whole, in place of a context that was saved there before. A process that is
        killed meanwhile leaves a hidden directory ``.<name>.<random>.partial`` next to it, which can be deleted. The
        ranks must share the file system.

        Parameters
        ----------
        while_waiting : callable
            Called on every rank again and again while files are written, such as a step of a batch, which must not use
            this context. What it raises on all ranks alike ends the saving.

        Raises
        ------
        ValueError
            On every rank, if something else is at `path`, or the folder it lies in does not exist.
        OSError
            On every rank, if one cannot write; nothing is left then but what was there before.
        """
        save_context(self, path, while_waiting)

    def _check_unshared(self) -> None:
        """Raise ValueError if something uses the buffers."""
        self.release_prefix()
        numbers = sorted(branch.number for branch in self._branches if not branch.is_freed)
        if numbers:
            raise ValueError(
                f"the context has branches (number {', '.join(map(str, numbers))}), which share its keys and values; "
                "free them with branch.free() before it moves."
            )
        if len(self._prefixes):
            raise ValueError("running requests of a batch share the context's keys and values; let them end first.")

    def branch(self) -> Branch:
        """Return a separate conversation that starts from what the context holds now, without copying it.

        Any number of branches share the document; each keeps its own turns, and the context keeps its. All ranks make
        them in the same order.
        """
        return Branch(self, self.token_ids, self.prefix())

    def note_branch(self, branch: Branch) -> int:
        """Note one more branch; return its number, from 1."""
        self._num_branches += 1
        self._branches.add(branch)
        return self._num_branches

    def prefix(self) -> Prefix:
        """Return what sequences share that begin now."""
        self.check_usable()
        if self._prefix is None or self._prefix.num_tokens != self.num_cached:
            self._prefix = Prefix(self.cache.attention, self.cache)
            self._prefixes.add(self._prefix)
        return self._prefix

    def release_prefix(self) -> None:
        """Leave the prefix to the sequences that have it: the cache's buffers may be replaced by longer ones."""
        self._prefix = None


class Branch:
    """A conversation about a context; see `Context.branch`. It takes a context's place in calls of the engine.

    A turn with ``append=True`` is kept in the branch. `free`, leaving it as a context manager, or dropping the last
    reference frees its turns, and not the document. A freed branch is refused wherever it is used.

    Attributes
    ----------
    context : the document
    token_ids : as `Context.token_ids`; later turns of the context are not among them
    number : among the context's, from 1
    """

    def __init__(self, context: Context, token_ids: Tensor, prefix: Prefix, suffix: Suffix | None = None) -> None:
        self.context = context
        self.number = context.note_branch(self)
        self.token_ids = token_ids
        self.suffix = suffix
        self.is_busy = False  # a sequence that appends to it is under way
        self._prefix: Prefix | None = prefix

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED.format("Branch"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __del__(self) -> None:
        suffix = getattr(self, "suffix", None)
        if suffix is not None:
            self.context.pool.abandon(suffix)

    @property
    def model(self) -> PreTrainedModel:
        return self.context.model

    @property
    def group(self) -> SequenceGroup:
        return self.context.group

    @property
    def plan(self) -> Plan:
        """How the document was split."""
        return self.context.plan

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.context.adapters

    @property
    def key(self) -> str:
        return self.context.key

    @property
    def facts(self) -> dict[str, Any]:
        """What calls compare between the ranks."""
        return {**self.context.facts, "tokens": self.num_tokens, "branch": self.number}

    @property
    def max_positions(self) -> int:
        return self.context.max_positions

    @property
    def num_tokens(self) -> int:
        """Tokens of the document and the turns kept since."""
        return int(self.token_ids.shape[1])

    @property
    def num_cached(self) -> int:
        """Tokens of document and turns that are stored, over all ranks; 0 once it was freed."""
        of_prefix = 0 if self._prefix is None else self._prefix.num_tokens
        return of_prefix + (0 if self.suffix is None else self.suffix.num_tokens)

    @property
    def is_freed(self) -> bool:
        return self._prefix is None

    def check_usable(self) -> None:
        """Raise ValueError once the branch was freed."""
        if self._prefix is None:
            raise ValueError(FREED)

    def prefix(self) -> Prefix:
        """Return what it began with."""
        self.check_usable()
        assert self._prefix is not None
        return self._prefix

    def branch(self) -> Branch:
        """Return a further conversation that starts from this one's turns, which are copied; the document is not.

        All ranks make them in the same order.

        Raises
        ------
        ValueError
            If this branch was freed.
        torch.OutOfMemoryError
            On the rank that runs out of memory.
        """
        with exclusive_call(self.model):
            prefix = self.prefix()
            suffix = None if self.suffix is None else self.context.pool.new([], self.suffix)
            return Branch(self.context, self.token_ids, prefix, suffix)

    def keep(self, token_ids: Tensor, suffix: Suffix) -> None:
        """Keep a turn: all ids, (1, tokens), and where its tokens are stored; a freed branch frees them."""
        if self.is_freed:
            self.context.pool.free(suffix)
            return
        self._forget_turns()
        self.token_ids, self.suffix = token_ids, suffix

    def free(self) -> None:
        """Free the branch's turns for good; freeing twice does nothing. All ranks do so in the same order."""
        with exclusive_call(self.model):
            self._forget_turns()
            self._prefix = None
            self.token_ids = self.token_ids[:, :0]

    def _forget_turns(self) -> None:
        if self.suffix is not None:
            self.context.pool.free(self.suffix)
            self.suffix = None
