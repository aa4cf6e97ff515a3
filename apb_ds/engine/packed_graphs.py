"""Decode steps of packs, recorded as CUDA graphs: by documents and number of rows, so that sequences come and go.

A recording holds the addresses of the documents' shards, of the slabs and of the weights; which slots, places and
positions a step uses, it reads from the device. Rows are padded to a few numbers, with sequences that store and see
nothing.

On several ranks the step has a collective in every layer. Ranks may mix replaying and running kernel by kernel, which
send the same messages, but recording runs the step one extra time: all ranks record at the same step, or none does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apb_ds.engine.cuda_graph import RECORD_AFTER, weights_of
from apb_ds.engine.packs import run_forward
from apb_ds.methods.packed import Member, Pack
from apb_ds.ops.kernels import KernelChoice
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.suffixes import SuffixPool
from apb_ds.utils.sizes import LayerAttention
from apb_ds.utils.text import first_line

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine

MAX_RECORDINGS = 4
ROWS_STEP = 8  # beyond that, numbers of rows are multiples of it; up to it, powers of two

# What a recording may need at most, for its intermediate results.
CAPTURE_BYTES = 2**31

logger = logging.getLogger(__name__)

_Cell = tuple[int, ...]  # a document, the slabs of a sequence by kind of layer, and how many slots these have
_Key = tuple[tuple[_Cell, ...], tuple[int, ...]]  # cells, and the rows for each


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return a device's stream for recordings, one for all: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, **pool: Any) -> Iterator[None]:
    """Record what is launched, as ``torch.cuda.graph`` does, but without emptying torch's caches of memory before.

    Those of a server hold tens of gigabytes, on the device and pinned, and take seconds to fill again.

    Parameters
    ----------
    **pool : ``pool``, a memory pool to share with other graphs; without it, this graph has its own
    """
    torch.cuda.synchronize()
    if torch.cuda.mem_get_info()[0] < CAPTURE_BYTES:
        torch.cuda.empty_cache()
    with torch.cuda.stream(_capture_stream(torch.cuda.current_device())):
        graph.capture_begin(**pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


def _new_pool(device: torch.device) -> torch.cuda.CUDAGraph:
    """Return a graph whose memory pool others share: a pool is there no more once no graph has it."""
    graph = torch.cuda.CUDAGraph()
    with _capturing(graph):
        torch.zeros(1, device=device)
    return graph


class PackedStep:
    """A step that reads from the device which sequences it is for.

    Parameters
    ----------
    rows : what it is made for: other sequences must have the same prefixes and slabs in the same order
    lengths : how many rows each of these has
    """

    def __init__(self, engine: APBEngine, rows: Sequence[Member], lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self._pack = Pack(engine.layers, engine.pool, rows, engine.device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._group = engine.group
        self._bytes_sent = 0
        self._weights = weights_of(engine.module)
        slabs = [place.slab for row in rows for place in row.suffix.places.values()]
        self._read: list[weakref.ref[Any]] = [weakref.ref(part) for part in (*(row.prefix for row in rows), *slabs)]

    @property
    def is_usable(self) -> bool:
        """Whether the documents and slabs are still there."""
        return all(part() is not None for part in self._read)

    def has_weights_of(self, model: nn.Module) -> bool:
        """Whether the model's weights are where they were."""
        return self._weights == weights_of(model)

    def warm_up(self, engine: APBEngine) -> None:
        """Run the step once, so that no first-use set-up is recorded."""
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            run_forward(engine, self._pack)
        torch.cuda.current_stream().wait_stream(side_stream)

    def record(self, engine: APBEngine, pool: Any) -> None:
        """Record the step, without computing or sending anything, in the pool of memory that recordings share."""
        sent_before = self._group.bytes_sent
        self._graph = torch.cuda.CUDAGraph()
        try:
            with _capturing(self._graph, pool=pool):
                self._logits = run_forward(engine, self._pack)
        finally:
            self._bytes_sent = self._group.bytes_sent - sent_before
            self._group.count_bytes(-self._bytes_sent)
        self._pack.release()

    def run(self, rows: Sequence[Member]) -> Tensor:
        """Feed the rows' tokens; return their logits, (rows, vocab), float32, to be read before the next step."""
        assert self._graph is not None and self._logits is not None
        self._pack.replace(rows)
        self._graph.replay()
        self._group.count_bytes(self._bytes_sent)
        return self._logits


class PackedGraphs:
    """The recorded steps of one engine's packs, the latest few.

    Parameters
    ----------
    model, group : as of the engine
    """

    def __init__(self, model: nn.Module, group: SequenceGroup) -> None:
        self._model = (model,)  # no part of a module tree
        self._group = group
        self._recordings: OrderedDict[_Key, PackedStep] = OrderedDict()
        self._first: torch.cuda.CUDAGraph | None = None  # keeps the pool of memory that recordings share
        self._has_failed = False
        self._sequences: tuple[int, ...] = ()  # of the last step
        self._cells: tuple[_Cell, ...] = ()
        self._num_steps = 0  # since that changed
        self._are_agreed = False  # whether all ranks have it recorded

    def run(self, engine: APBEngine, members: Sequence[Member]) -> Tensor | None:
        """Run a step that is recorded, or whose turn to be recorded has come; return its logits, else None.

        Parameters
        ----------
        members : with one new token each, and room for it

        Returns
        -------
        (members, vocab), float32, in the order of `members`, to be read before the next step
        """
        if self._has_failed:
            return None
        cells = _cells_of(members)
        sequences = tuple(member.suffix.number for member in members)
        have_changed = sequences != self._sequences
        # Ranks store sequences in other slabs than each other, but all know when one joins or leaves.
        is_new = have_changed if self._group.world_size > 1 else tuple(cells) != self._cells
        self._sequences, self._cells = sequences, tuple(cells)
        self._num_steps = 1 if is_new else self._num_steps + 1
        recording = self._find(cells, have_changed)
        if is_new or self._group.world_size == 1:
            self._are_agreed = self._all(recording is not None, engine.device)
        if not self._are_agreed and self._num_steps >= RECORD_AFTER:
            is_turn = self._group.world_size == 1 or self._num_steps == RECORD_AFTER
            recording = self._record(engine, cells) if is_turn else None
            self._are_agreed = recording is not None
        if recording is None or not self._are_agreed:
            return None
        rows = _rows_of(engine.pool, cells, recording.lengths)
        logits = recording.run(rows)
        places = {id(row): place for place, row in enumerate(rows)}
        order = [places[id(member)] for member in members]
        return logits if order == list(range(len(rows))) else logits[order]

    def _find(self, cells: Mapping[_Cell, Sequence[Member]], have_changed: bool) -> PackedStep | None:
        """Return the recording that serves the members with the fewest rows, if none of its parts are far too long."""
        fitting: list[tuple[int, _Key]] = []
        for key, recording in list(self._recordings.items()):
            is_valid = recording.is_usable and (not have_changed or recording.has_weights_of(self._model[0]))
            if not is_valid:
                del self._recordings[key]
                continue
            pairs = list(zip(cells.values(), recording.lengths, strict=False))
            serves = all(len(of_cell) <= length <= 2 * _padded_length(len(of_cell)) for of_cell, length in pairs)
            if key[0] == tuple(cells) and serves:
                fitting.append((sum(recording.lengths), key))
        if not fitting:
            return None
        _, key = min(fitting)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _record(self, engine: APBEngine, cells: Mapping[_Cell, Sequence[Member]]) -> PackedStep | None:
        """Record a step on all ranks together; if that fails on one of them, none has it or tries again."""
        lengths = tuple(_padded_length(len(of_cell)) for of_cell in cells.values())
        while len(self._recordings) >= MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        failure: RuntimeError | None = None
        recording: PackedStep | None = None
        try:
            recording = PackedStep(engine, _rows_of(engine.pool, cells, lengths), lengths)
            recording.warm_up(engine)
        except RuntimeError as error:
            if self._group.world_size > 1:
                raise  # the others are in its collectives
            failure = error
        try:
            if failure is None and recording is not None:
                self._first = self._first or _new_pool(engine.device)
                recording.record(engine, self._first.pool())
        except RuntimeError as error:  # something in the model waits for the device, or memory ran out
            failure = error
        if self._all(failure is None, engine.device) and recording is not None:
            self._recordings[tuple(cells), lengths] = recording
            return recording
        self._has_failed = True
        if failure is not None:
            logger.warning("Packs decode without CUDA graphs: a step cannot be recorded (%s).", first_line(failure))
        return None

    def _all(self, mine: bool, device: torch.device) -> bool:
        """Return whether it is true on all ranks; all of them call this together."""
        if self._group.world_size == 1:
            return mine
        return bool(self._group.all_gather(torch.tensor([mine], dtype=torch.int64, device=device)).all())


def _cells_of(members: Sequence[Member]) -> dict[_Cell, list[Member]]:
    """Group sequences by what a recording depends on."""
    cells: dict[_Cell, list[Member]] = {}
    for member in members:
        slabs = [place.slab for place in member.suffix.places.values()]
        cell = id(member.prefix), *(number for slab in slabs for number in (id(slab), slab.num_slots))
        cells.setdefault(cell, []).append(member)
    return cells


def _padded_length(number: int) -> int:
    if number > ROWS_STEP:
        return -(-number // ROWS_STEP) * ROWS_STEP
    return 1 << (number - 1).bit_length()


def _rows_of(pool: SuffixPool, cells: Mapping[_Cell, Sequence[Member]], lengths: Sequence[int]) -> list[Member]:
    """Return the sequences of all cells, each with more that store and see nothing."""
    rows: list[Member] = []
    for members, length in zip(cells.values(), lengths, strict=True):
        first = members[0]
        padding = Member(first.prefix, pool.padding(first.suffix), [0], first.reach)
        rows += [*members, *[padding] * (length - len(members))]
    return rows


def can_record_packs(kernels: Iterable[KernelChoice], layers: Sequence[LayerAttention]) -> bool:
    """Whether steps can be part of a CUDA graph: not if a layer expands its keys, of which there are ever more."""
    in_slots = all(layer.stores_attended or not layer.stores for layer in layers)
    return in_slots and all(choice.decode.can_be_recorded for choice in kernels)
