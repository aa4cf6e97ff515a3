"""A prefilled document, from which queries and conversations are answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn, Self

from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.cache import ShardedCache
from apb_ds.engine.calls import exclusive_call
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan
from apb_ds.suffixes import Prefix, Suffix, SuffixPool

NOT_PICKLED = (
    "a {} cannot be pickled or saved with torch.save: it holds the engine's model and process group. Prefill the "
    "document again instead."
)
FREED = "context is a branch that was freed; make another with context.branch()."


@dataclass
class Context:
    """A document in the sharded cache of one engine, made by `APBEngine.prefill`.

    Attributes
    ----------
    plan : how the document was split
    cache : this rank's shard
    token_ids : (1, tokens), int64, on the model's device: the document and every turn kept since. The last
        token of a generated turn is not in the cache yet; the next forward feeds it first.
    max_positions : positions that the rotary frequencies were chosen for
    prefill_s : seconds of the prefill on this rank
    bytes_sent : bytes that this rank sent to others during the prefill
    model, group : the engine's that made it
    pool : that engine's, where branches are stored
    key : digest of settings and tokens, the same on every rank; empty for a group of one rank
    """

    plan: Plan
    cache: ShardedCache = field(repr=False)
    token_ids: Tensor = field(repr=False)
    max_positions: int
    prefill_s: float
    bytes_sent: int
    model: PreTrainedModel = field(repr=False)
    group: SequenceGroup = field(repr=False)
    pool: SuffixPool = field(repr=False)
    key: str = ""
    _num_branches: int = field(default=0, init=False, repr=False)
    _prefix: Prefix | None = field(default=None, init=False, repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED.format("Context"))

    @property
    def num_tokens(self) -> int:
        """Tokens of the document and the turns kept since."""
        return int(self.token_ids.shape[1])

    @property
    def num_cached(self) -> int:
        """Tokens in the cache, over all ranks."""
        return self.cache.get_seq_length()

    def branch(self) -> Branch:
        """Return a separate conversation that starts from what the context holds now, without copying it.

        Any number of branches share the document; each keeps its own turns, and the context keeps its. All ranks make
        them in the same order.
        """
        return Branch(self, self.token_ids, self.prefix())

    def count_branch(self) -> int:
        """Return the number of one more branch, from 1."""
        self._num_branches += 1
        return self._num_branches

    def prefix(self) -> Prefix:
        """Return what sequences share that begin now."""
        if self._prefix is None or self._prefix.num_tokens != self.num_cached:
            self._prefix = Prefix(self.cache.attention, self.cache)
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
        self.number = context.count_branch()
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
    def key(self) -> str:
        return self.context.key

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
