"""Many requests at once: sequences join and leave between steps, and share every forward.

All ranks call the methods of a batch in the same order with the same arguments. The first rank chooses the tokens, and
sends them with who has ended; it also says after how many layers of a prefill the next step comes, so that steps run
inside a prefill at the same place on every rank.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as PySequence
from enum import IntEnum
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from apb_ds.engine.calls import ended_after_errors, exclusive_call
from apb_ds.engine.choosing import Chooser, prepare
from apb_ds.engine.context import Branch, Context
from apb_ds.engine.decoding import RequestStats
from apb_ds.engine.pace import Pace
from apb_ds.engine.packs import FEWER_SEQUENCES, cut_query, in_forwards, ordered_by_prefix, run_pack
from apb_ds.engine.sequences import Cancelled, Handle, OnProgress, Sequence
from apb_ds.engine.validation import GenerateCall, PrefillRequest, QueryRequest
from apb_ds.hf.adapters import adapters_in_force, name_adapters
from apb_ds.methods.packed import Member
from apb_ds.ops.memory import available_bytes, explain_out_of_memory
from apb_ds.parallel.consistency import shared_validation
from apb_ds.parallel.launcher import ranks_on_node
from apb_ds.suffixes import CopiedDocument

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine

# Up to this length, a document that runs exact is fed together with its query, without a separate prefill.
SHORT_DOCUMENT_TOKENS = 1024
# Up to this length of each rank's shard, a document that a lone sequence asks about is copied to where the sequence's
# own tokens are: attention to many sequences is one call then, and recorded steps serve the next documents, too.
COPIED_DOCUMENT_TOKENS = 8192
MAX_SEQUENCES = 32
STEP_EVERY_S = 0.25
CLOSED = "the batch was closed."
USED_CLOSED = "the batch was closed; make another with engine.batch()."
CANCELLED = "the request was cancelled."
OUTDATED = "the context or branch changed while the request waited to join; submit the request again."


class _Verdict(IntEnum):
    GO_ON = 0
    STOP = 1
    FAILED = 2
    CANCELLED = 3


class Batch:
    """Sequences that decode together; made by `APBEngine.batch`, and closed as a context manager.

    Parameters
    ----------
    max_sequences : that decode at a time; further ones wait
    max_bytes : per rank, of what sequences store besides their documents, and of documents that the batch prefills
    step_every_s : seconds of a prefill between two steps inside it, about, which these come on top of
    on_pause : called on every rank before each step inside a prefill. Requests that it submits about contexts join in
        that step; raising an exception, on all ranks alike, abandons the prefill.

    Attributes
    ----------
    stats : where the time went on this rank: of all prefills (with the steps inside them), queries and steps
    """

    def __init__(
        self,
        engine: APBEngine,
        max_sequences: int,
        max_bytes: int | None,
        step_every_s: float,
        on_pause: Callable[[], None] | None = None,
    ) -> None:
        if isinstance(max_sequences, bool) or not isinstance(max_sequences, int) or max_sequences < 1:
            raise ValueError(f"max_sequences={max_sequences!r} must be an integer of at least 1.")
        self._engine = engine
        self._group = engine.group
        self._max_sequences = max_sequences
        self._pace = Pace(engine.group, engine.device, step_every_s)
        self._on_pause = on_pause
        self._pool = engine.pool
        # Only recorded steps need all sequences to be alike.
        self._max_copied = COPIED_DOCUMENT_TOKENS if engine._acceleration.packed is not None else 0
        if max_bytes is None:  # the ranks differ, so the smallest counts
            sharing = ranks_on_node() if engine.device.type == "cpu" else 1
            mine = torch.tensor([available_bytes(engine.device) // sharing], device=engine.device)
            max_bytes = int(self._group.all_gather(mine).min())
        self._max_bytes = max_bytes
        self._reserved: dict[int, int] = {}  # bytes, by id of the handle
        self._waiting: deque[Handle] = deque()
        self._joining: list[Sequence] = []  # they have slots, and feed their queries next
        self._running: list[Sequence] = []
        self._ended: list[Handle] = []
        self._failure: BaseException | None = None
        self._is_closed = False
        self._adapters: tuple[str, ...] = ()  # of the requests that have not ended
        self.stats = RequestStats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._joining) + len(self._running)

    def submit(
        self,
        query_ids: Tensor,
        *,
        context: Context | Branch | None = None,
        document_ids: Tensor | None = None,
        max_new_tokens: int | None = None,
        append: bool = False,
        seed: int | None = None,
        progress: OnProgress | None = None,
        on_end: Callable[[Handle], None] | None = None,
        **generate_arguments: Any,
    ) -> Handle:
        """Ask a question, which joins at a later `step`.

        Parameters
        ----------
        query_ids, document_ids : (1, tokens), int64, the same on every rank
        context : Context or Branch
            What the question is about; or `document_ids`, which are prefilled when the request's turn comes.
        append : bool
            Keep query and answer in the branch. A context itself takes no turns from a batch.
        max_new_tokens, seed, progress, **generate_arguments : as in `APBEngine.generate`
        on_end : callable
            Called with the handle once the request has ended, also inside a prefill.

        Raises
        ------
        ValueError
            On every rank, before anything is sent, for bad input and for a request that needs more memory than the
            batch has.
        RuntimeError
            Likewise, if the batch was closed.
        """
        engine = self._engine
        call = GenerateCall(document_ids, query_ids, max_new_tokens, context, append, seed, generate_arguments)
        streamer = generate_arguments.get("streamer") if self._group.is_first else None
        with (
            exclusive_call(engine.module),
            ended_after_errors(streamer),
            shared_validation(self._group, "submit", engine.device) as comparison,
        ):
            self._check_usable()
            request = engine._validator.generate(call)
            self._check(request)
            comparison.facts = request.facts | engine._shared_facts
        return self.add(request, comparison.digest, progress, on_end)

    def add(
        self,
        request: QueryRequest,
        key: str = "",
        progress: OnProgress | None = None,
        on_end: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """Take a request that is valid, the same on every rank; see `submit`.

        Parameters
        ----------
        key : of the context that is made if its document is to be prefilled
        """
        self._check(request)
        if not len(self):
            self._adapters = adapters_in_force(self._engine.module)
        handle = Handle(request, key, progress, on_end)
        if handle.kept_in is not None:
            handle.kept_in.is_busy = True
        self._waiting.append(handle)
        return handle

    def _check(self, request: QueryRequest) -> None:
        if request.append and not isinstance(request.source, Branch):
            raise ValueError("append=True in a batch needs context=context.branch(), where the turn is kept.")
        needed = self._bytes_for(request)
        if needed > self._max_bytes:
            raise ValueError(
                f"the request needs {needed / 2**20:.0f} MiB on a rank, for a query of {_forwards(request)[0]} and "
                f"{request.num_new} new tokens; the batch has {self._max_bytes / 2**20:.0f} MiB."
            )

    def prefill(
        self,
        document_ids: Tensor,
        query_ids: Tensor | None = None,
        *,
        max_positions: int | None = None,
        new_tokens: int | None = None,
        progress: OnProgress | None = None,
    ) -> Context:
        """Prefill a document as `APBEngine.prefill` does, while the sequences go on between its layers.

        Parameters
        ----------
        new_tokens : int
            For how many tokens there is room behind the document, on all ranks together. Requests of a batch and
            branches need none. By default up to `max_positions`, as the context's own turns do.
        """
        engine = self._engine
        with exclusive_call(engine.module):
            with shared_validation(self._group, "prefill", engine.device) as comparison:
                self._check_usable()
                request = engine._validator.prefill(document_ids, query_ids, max_positions)
                comparison.facts = request.facts | engine._shared_facts
            return self._prefill(request, comparison.digest, progress, new_tokens)

    def step(self) -> list[Handle]:
        """Let waiting requests join, as far as there is room, and give every sequence its next token.

        While others are answered, requests join one forward at a time, and a long query in several steps.

        Returns
        -------
        The requests that have ended since the last call, each with a result or an error.

        Raises
        ------
        torch.OutOfMemoryError, RuntimeError
            If the forward of a step fails on this rank. No sequence has changed then, so it can be tried again. If the
            batch was closed.
        ValueError
            If other peft adapters are in force than when the requests came.
        """
        with exclusive_call(self._engine.module):
            self._check_usable()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            self._join()
            self._decode()
            self._engine.group.progress.leave_model()
            ended, self._ended = self._ended, []
            return ended

    def cancel(self, handle: Handle) -> None:
        """End a request at once, with a `Cancelled` error. All ranks call this together, unlike `Handle.cancel`."""
        with exclusive_call(self._engine.module):
            self._cancel(handle)

    def run(self) -> None:
        """Step until all requests have ended."""
        while len(self):
            self.step()

    def close(self) -> None:
        """End what has not ended, with a `Cancelled` error, and free all sequences; the batch takes no more."""
        with exclusive_call(self._engine.module):
            self._is_closed = True
            for sequence in [*self._joining, *self._running]:
                self._end(sequence, Cancelled(CLOSED))
            while self._waiting:
                self._finish(self._waiting.popleft(), Cancelled(CLOSED))

    def _cancel(self, handle: Handle) -> None:
        for sequence in [*self._joining, *self._running]:
            if sequence.handle is handle:
                self._end(sequence, Cancelled(CANCELLED))
        if handle in self._waiting:
            self._waiting.remove(handle)
            self._finish(handle, Cancelled(CANCELLED))

    def _check_usable(self) -> None:
        """Raise RuntimeError once it was closed, ValueError if the model's adapters were switched under requests."""
        if self._is_closed:
            raise RuntimeError(USED_CLOSED)
        adapters = adapters_in_force(self._engine.module)
        if len(self) and adapters != self._adapters:
            raise ValueError(
                f"the batch answers {len(self)} requests with {name_adapters(self._adapters)}, and the model now has "
                f"{name_adapters(adapters)}; switch back until they have ended."
            )

    # --- joining -----------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Let requests join, in order: those about documents that are there in few forwards, the others one by one.

        While others are answered, that takes several steps: only one forward or prefill comes between two of these.
        """
        if self._running:
            self._join_between_steps()
            if self._joining and self._needs_prefill(self._joining[0]):
                self._prefill_for(self._joining[0])
            return
        while self._join_at_once() or self._joining:
            for one in list(self._joining):
                if self._prefill_for(one):
                    self._feed([one])

    def _join_at_once(self, *, in_prefill: bool = False) -> bool:
        """Let those join that need no prefill, and admit the others; return whether there were any."""
        admitted = self._admit(in_prefill)
        self._joining += self._prepare(admitted)
        for forward in in_forwards(self._at_once, lambda one: len(one.fed)):
            self._feed(forward)
        return bool(admitted)

    def _join_between_steps(self, *, in_prefill: bool = False) -> None:
        """Let some of those join that need no prefill, in one forward, and admit others."""
        self._joining += self._prepare(self._admit(in_prefill))
        forwards = in_forwards(self._at_once, lambda one: len(one.fed))
        if not forwards:
            return
        first = forwards[0][0]
        if len(cut_query(len(first.fed))) > 1:
            self._feed_part(first)
        else:
            self._feed(forwards[0])

    @property
    def _at_once(self) -> list[Sequence]:
        """Those that join without a prefill."""
        return [one for one in self._joining if not self._needs_prefill(one)]

    def _admit(self, in_prefill: bool) -> list[Handle]:
        """Take the requests from the queue that have room, in order; inside a prefill, until one needs another."""
        admitted: list[Handle] = []
        num_free = self._max_sequences - len(self._running) - len(self._joining)
        while self._waiting and len(admitted) < num_free:
            request = self._waiting[0].request
            if self._waiting[0].is_outdated:
                self._finish(self._waiting.popleft(), ValueError(OUTDATED))
                continue
            num_free_bytes = self._max_bytes - sum(self._reserved.values())
            needed = self._bytes_for(request)
            if needed > num_free_bytes or (in_prefill and _is_long(request.source)):
                break
            handle = self._waiting.popleft()
            with_copy = self._bytes_with_copy(handle, admitted)
            handle.copies_document = with_copy is not None and with_copy <= num_free_bytes
            admitted.append(handle)
            self._reserved[id(handle)] = with_copy if handle.copies_document and with_copy is not None else needed
        return admitted

    def _bytes_with_copy(self, handle: Handle, admitted: list[Handle]) -> int | None:
        """Return the bytes of a request that copies its document; None if it is long or shared, or has turns."""
        source = handle.request.source
        if not isinstance(source, Context) or not source.num_tokens == source.num_cached == source.plan.num_tokens:
            return None
        stored = source.plan.shard_lengths
        if max(stored) > self._max_copied:
            return None
        under_way = (one.handle for one in [*self._joining, *self._running])
        if any(_document_of(other) is source for other in chain(self._waiting, admitted, under_way)):
            return None
        return self._suffix_bytes(handle.request, stored)

    def _prepare(self, handles: list[Handle]) -> list[Sequence]:
        """Give requests their slots and choosers; those for which that fails on any rank end."""
        if not handles:
            return []
        prepared: list[Sequence | Exception] = []
        for handle in handles:
            try:
                prepared.append(self._sequence(handle))
            except Exception as error:
                prepared.append(error)
        verdicts = torch.tensor([_verdict(made) for made in prepared], device=self._engine.device)
        anywhere = self._group.all_gather(verdicts).amax(dim=0).tolist()
        ready = []
        for handle, made, verdict in zip(handles, prepared, anywhere, strict=True):
            if isinstance(made, Exception):
                self._finish(handle, made)
            elif verdict != _Verdict.GO_ON:
                self._pool.free(made.suffix)
                others = RuntimeError("another rank could not begin the request; see its message.")
                self._finish(handle, Cancelled(CANCELLED) if verdict == _Verdict.CANCELLED else others)
            else:
                ready.append(made)
        return ready

    def _sequence(self, handle: Handle) -> Sequence:
        """Return a request's sequence; its prefix is empty until its document has been prefilled."""
        request, source = handle.request, handle.request.source
        forwards = _forwards(request)
        # First: whatever fails on one rank, all of them have made as many suffixes, and agree on who stores what.
        with explain_out_of_memory(f"making room for {sum(forwards)} tokens", FEWER_SEQUENCES):
            document = None
            if handle.copies_document and isinstance(source, Context):
                document = CopiedDocument(source.prefix(), source.plan.shard_lengths)
            suffix = self._pool.new(forwards, getattr(source, "suffix", None), document)
        try:
            if handle.is_cancelled and self._group.is_first:
                raise Cancelled(CANCELLED)
            if isinstance(source, PrefillRequest):
                prefix, known = self._pool.nothing, source.document_ids
            else:
                prefix = self._pool.nothing if document is not None else source.prefix()
                known = source.token_ids
            prompt = torch.cat([known, request.ids], dim=-1)
            fed = prompt[0, -forwards[0] :].tolist()
            chooser: Chooser | None = None
            if self._group.is_first:
                model = self._engine.module
                chooser = prepare(model, prompt, request.num_new, request.arguments, seed=request.seed)
            return Sequence(handle, prefix, suffix, fed, source.max_positions, prompt, chooser)
        except BaseException:
            self._pool.free(suffix)
            raise

    def _needs_prefill(self, sequence: Sequence) -> bool:
        return _is_long(sequence.handle.request.source) and sequence.prefix is self._pool.nothing

    def _prefill_for(self, sequence: Sequence) -> bool:
        """Prefill a sequence's document; return whether that went well."""
        request: Any = sequence.handle.request
        try:
            context = self._prefill(request.source, sequence.handle.key, sequence.handle.progress)
        except Exception as error:
            if self._group.world_size > 1:
                raise  # the others are in its collectives
            self._end(sequence, error)
            return False
        sequence.prefix = context.prefix()
        return True

    def _feed_part(self, sequence: Sequence) -> None:
        """Feed the beginning of a long query."""
        num_tokens = cut_query(len(sequence.fed))[0]
        part = Member(sequence.prefix, sequence.suffix, sequence.fed[:num_tokens], sequence.reach)
        began = self._engine._now()
        if self._run_queries([sequence], [part]) is not None:
            sequence.fed = sequence.fed[num_tokens:]
        seconds = self._engine._now() - began
        self.stats.query_s += seconds
        sequence.handle.query_s += seconds

    def _run_queries(self, sequences: list[Sequence], members: PySequence[Member]) -> Tensor | None:
        """Return the logits of what sequences feed; None if that failed, which ends them."""
        try:
            return run_pack(self._engine, members)
        except Exception as error:
            if self._group.world_size > 1:
                raise
            for one in sequences:
                self._end(one, error)
            return None

    def _feed(self, joining: list[Sequence]) -> None:
        """Run the queries of some sequences, and choose their first tokens."""
        sequences = _ordered(joining)
        began = self._engine._now()
        logits = self._run_queries(sequences, sequences)
        if logits is None:
            return
        self._joining = [one for one in self._joining if one not in sequences]
        self._running += sequences
        self._choose(sequences, logits)
        seconds = self._engine._now() - began
        self.stats.query_s += seconds
        for one in sequences:
            one.handle.query_s += seconds
            one.handle.answered()

    # --- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Give every sequence its next token."""
        if not self._running:
            return
        began = self._engine._now()
        sequences = self._running = _ordered(self._running)
        logits = run_pack(self._engine, sequences)
        self._choose(list(sequences), logits, [*self._waiting, *(one.handle for one in self._at_once)])
        seconds = self._engine._now() - began
        self.stats.decode_s += seconds
        for one in sequences:
            one.handle.decode_s += seconds

    def _choose(self, sequences: list[Sequence], logits: Tensor, pending: list[Handle] | None = None) -> None:
        """Choose each sequence's token on the first rank, tell all ranks, and end those that have ended.

        Parameters
        ----------
        pending : requests without a token, which end if they were cancelled
        """
        pending = pending or []
        failures: dict[int, BaseException] = {}
        chosen: list[tuple[int, int]] = []
        if self._group.is_first:
            chosen = self._chosen(sequences, logits, failures)
            chosen += [(0, _Verdict.CANCELLED if one.is_cancelled else _Verdict.GO_ON) for one in pending]
        if self._group.world_size > 1:
            num_rows = len(sequences) + len(pending)
            message = torch.tensor(chosen) if self._group.is_first else torch.zeros((num_rows, 2)).long()
            chosen = self._group.broadcast(message.to(self._engine.device)).tolist()
        for handle, (_, verdict) in zip(pending, chosen[len(sequences) :], strict=True):
            if verdict == _Verdict.CANCELLED:
                self._cancel(handle)
        chosen = chosen[: len(sequences)]
        for index, (one, (token, verdict)) in enumerate(zip(sequences, chosen, strict=True)):
            if verdict in (_Verdict.GO_ON, _Verdict.STOP):
                one.add(token)
                self.stats.new_tokens += 1
            if verdict == _Verdict.STOP:
                self._end(one)
            elif verdict == _Verdict.CANCELLED:
                self._end(one, Cancelled(CANCELLED))
            elif verdict == _Verdict.FAILED:
                others = RuntimeError("the first rank failed while choosing a token; see its message.")
                self._end(one, failures.get(index, others))

    def _chosen(
        self, sequences: list[Sequence], logits: Tensor, failures: dict[int, BaseException]
    ) -> list[tuple[int, int]]:
        """Return token and verdict of each sequence; an exception ends its own sequence alone."""
        likeliest = logits.argmax(dim=-1).tolist()
        found: list[tuple[int, int]] = []
        for index, one in enumerate(sequences):
            if one.handle.is_cancelled:
                found.append((0, _Verdict.CANCELLED))
                continue
            try:
                is_plain = one.chooser is not None and one.chooser.is_plain
                token, ends = one.take(likeliest[index]) if is_plain else one.choose(logits[index : index + 1])
                found.append((token, _Verdict.STOP if ends else _Verdict.GO_ON))
            except Exception as error:
                failures[index] = error
                found.append((0, _Verdict.FAILED))
        return found

    # --- ending ------------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, error: BaseException | None = None) -> None:
        """End a sequence: keep its turn where that was asked, else free it."""
        handle = sequence.handle
        self._joining = [one for one in self._joining if one is not sequence]
        self._running = [one for one in self._running if one is not sequence]
        if error is None and handle.kept_in is not None:
            handle.kept_in.keep(sequence.all_ids, sequence.suffix)
        else:
            self._pool.free(sequence.suffix)
        self._finish(handle, error)

    def _finish(self, handle: Handle, error: BaseException | None = None) -> None:
        handle.error, handle.is_done = error, True
        self._reserved.pop(id(handle), None)
        if handle.kept_in is not None:
            handle.kept_in.is_busy = False
        streamer = handle.request.arguments.get("streamer") if self._group.is_first else None
        if error is not None and streamer is not None:
            with contextlib.suppress(Exception):  # it may be what has failed
                streamer.end()
        self._ended.append(handle)
        if handle.on_end is not None:
            handle.on_end(handle)

    # --- memory, and prefill -----------------------------------------------------------------------------------------

    def _bytes_for(self, request: QueryRequest) -> int:
        """Return the most bytes that a request needs on a rank."""
        source = request.source
        needed = self._suffix_bytes(request)
        if isinstance(source, PrefillRequest) and _is_long(source):
            needed += self._pool.document_bytes(max(source.plan.shard_lengths))
        return needed

    def _suffix_bytes(self, request: QueryRequest, stored: PySequence[int] | None = None) -> int:
        """Return the most bytes of a request's suffix on a rank, whether its query is fed whole or in parts.

        Parameters
        ----------
        stored : of a document that is copied, tokens of each rank
        """
        source = getattr(request.source, "suffix", None)
        query, *others = _forwards(request)
        parts = cut_query(query)
        needed = self._pool.bytes_for([query, *others], source, stored)
        return max(needed, self._pool.bytes_for([*parts, *others], source, stored)) if len(parts) > 1 else needed

    def _prefill(
        self, request: PrefillRequest, key: str, progress: OnProgress | None, new_tokens: int | None = 0
    ) -> Context:
        """Prefill a document, with steps between its layers."""
        context = self._engine._run_prefill(request, key, self.pausing(progress), new_tokens)
        self.stats.prefill_s += context.prefill_s
        return context

    def pausing(self, progress: OnProgress | None = None) -> OnProgress:
        """Return what something long is to call after each of its parts, on every rank: steps run inside it.

        Parameters
        ----------
        progress : called with the same arguments
        """
        self._pace.begin()

        def after_part(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            is_idle = not self._running and self._on_pause is None
            if not self._pace.count() or is_idle or self._failure is not None:
                return
            self._pace.pause(self._engine._now())
            if self._on_pause is not None:
                self._on_pause()
                join = self._join_between_steps if self._running else self._join_at_once
                join(in_prefill=True)
            try:
                self._decode()
            except torch.OutOfMemoryError as error:
                if self._group.world_size > 1:
                    raise
                self._failure = error  # raised by the next step: the prefill goes on
            self._pace.go_on()

        return after_part


def _verdict(prepared: Sequence | Exception) -> int:
    if isinstance(prepared, Cancelled):
        return _Verdict.CANCELLED
    return _Verdict.FAILED if isinstance(prepared, Exception) else _Verdict.GO_ON


def _ordered(sequences: list[Sequence]) -> list[Sequence]:
    return ordered_by_prefix(sequences, lambda one: id(one.prefix))


def _forwards(request: QueryRequest) -> list[int]:
    """Return how many tokens each of a request's forwards feeds."""
    source = request.source
    fed = request.ids.shape[1]
    if not isinstance(source, PrefillRequest):
        fed += source.num_tokens - source.num_cached
    elif not _is_long(source):
        fed += source.document_ids.shape[1]
    return [fed] + [1] * (request.num_new - 1)


def _document_of(handle: Handle) -> Context | None:
    """Return the context that a request, or the branch that it asks, is about."""
    source = handle.request.source
    if isinstance(source, Branch):
        return source.context
    return source if isinstance(source, Context) else None


def _is_long(source: Context | Branch | PrefillRequest) -> bool:
    """Whether it is a document that must be prefilled separately."""
    if not isinstance(source, PrefillRequest):
        return False
    return not source.plan.exact or source.document_ids.shape[1] > SHORT_DOCUMENT_TOKENS
