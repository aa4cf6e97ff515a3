"""Many requests at once: sequences join and leave between steps, and share every forward.

All ranks call the methods of a batch in the same order with the same arguments. The first rank chooses the tokens and
sends, with those of each step, who has ended and after how many layers of a prefill the next step comes: so steps run
inside a prefill at the same place on every rank.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from apb_ds.engine.calls import ended_after_errors, exclusive_call
from apb_ds.engine.choosing import Chooser, prepare
from apb_ds.engine.context import Branch, Context
from apb_ds.engine.decoding import RequestStats
from apb_ds.engine.packs import FEWER_SEQUENCES, in_forwards, ordered_by_prefix, run_pack
from apb_ds.engine.sequences import Cancelled, Handle, OnProgress, Sequence
from apb_ds.engine.validation import GenerateCall, PrefillRequest, QueryRequest
from apb_ds.ops.memory import available_bytes, explain_out_of_memory
from apb_ds.parallel.consistency import shared_validation
from apb_ds.parallel.launcher import ranks_on_node
from apb_ds.suffixes import Prefix

if TYPE_CHECKING:
    from apb_ds.engine.engine import APBEngine

# Up to this length, a document that runs exact is fed together with its query, without a separate prefill.
SHORT_DOCUMENT_TOKENS = 1024
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

    Attributes
    ----------
    stats : where the time went on this rank: of all prefills (with the steps inside them), queries and steps
    """

    def __init__(self, engine: APBEngine, max_sequences: int, max_bytes: int | None, step_every_s: float) -> None:
        if isinstance(max_sequences, bool) or not isinstance(max_sequences, int) or max_sequences < 1:
            raise ValueError(f"max_sequences={max_sequences!r} must be an integer of at least 1.")
        self._engine = engine
        self._group = engine.group
        self._max_sequences = max_sequences
        self._step_every_s = step_every_s
        self._pool = engine.pool
        self._nothing = Prefix(engine.layers)
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
        self._layers_left = 1  # of a prefill, until the next step
        self._layers_since, self._began = 0, 0.0
        self._layers_s = 0.0  # of the layers since then, without the step that follows
        self._failure: BaseException | None = None
        self._is_closed = False
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

        Raises
        ------
        ValueError
            On every rank, before anything is sent, for bad input and for a request that needs more memory than the
            batch has.
        RuntimeError
            Likewise, if the batch was closed.
        """
        engine = self._engine
        call = GenerateCall(
            document_ids, query_ids, max_new_tokens, context, append, None, None, seed, generate_arguments
        )
        streamer = generate_arguments.get("streamer") if self._group.is_first else None
        with (
            exclusive_call(engine.module),
            ended_after_errors(streamer),
            shared_validation(self._group, "submit", engine.device) as comparison,
        ):
            self._check_open()
            request = engine._validator.generate(call)
            self._check(request)
            comparison.facts = request.facts | engine._shared_facts
        return self.add(request, comparison.digest, progress)

    def add(self, request: QueryRequest, key: str = "", progress: OnProgress | None = None) -> Handle:
        """Take a request that is valid, the same on every rank; see `submit`."""
        self._check(request)
        handle = Handle(request, key, progress)
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
        progress: OnProgress | None = None,
    ) -> Context:
        """Prefill a document as `APBEngine.prefill` does, while the sequences go on between its layers."""
        engine = self._engine
        with exclusive_call(engine.module):
            with shared_validation(self._group, "prefill", engine.device) as comparison:
                self._check_open()
                request = engine._validator.prefill(document_ids, query_ids, max_positions)
                comparison.facts = request.facts | engine._shared_facts
            return self._prefill(request, comparison.digest, progress)

    def step(self) -> list[Handle]:
        """Let waiting requests join, as far as there is room, and give every sequence its next token.

        Returns
        -------
        The requests that have ended since the last call, each with a result or an error.

        Raises
        ------
        torch.OutOfMemoryError, RuntimeError
            If the forward of a step fails on this rank. No sequence has changed then, so it can be tried again. If the
            batch was closed.
        """
        with exclusive_call(self._engine.module):
            self._check_open()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            self._join()
            self._decode()
            self._engine.group.progress.leave_model()
            ended, self._ended = self._ended, []
            return ended

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

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(USED_CLOSED)

    # --- joining -----------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Let requests join, in order: those about documents that are there in few forwards, the others one by one."""
        while True:
            self._joining += self._prepare(self._admit())
            if not self._joining:
                return
            at_once = [one for one in self._joining if not self._needs_prefill(one)]
            for forward in in_forwards(at_once, lambda one: len(one.fed)):
                self._feed(forward)
            for one in list(self._joining):
                if self._prefill_for(one):
                    self._feed([one])

    def _admit(self) -> list[Handle]:
        """Take the requests from the queue that have room, in order."""
        admitted: list[Handle] = []
        num_free = self._max_sequences - len(self._running) - len(self._joining)
        while self._waiting and len(admitted) < num_free:
            if self._waiting[0].is_outdated:
                self._finish(self._waiting.popleft(), ValueError(OUTDATED))
                continue
            needed = self._bytes_for(self._waiting[0].request)
            if sum(self._reserved.values()) + needed > self._max_bytes:
                break
            admitted.append(self._waiting.popleft())
            self._reserved[id(admitted[-1])] = needed
        return admitted

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
            suffix = self._pool.new(forwards, getattr(source, "suffix", None))
        try:
            if handle.is_cancelled and self._group.is_first:
                raise Cancelled(CANCELLED)
            if isinstance(source, PrefillRequest):
                prefix, known = self._nothing, source.document_ids
            else:
                prefix, known = source.prefix(), source.token_ids
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
        source = sequence.handle.request.source
        is_long = isinstance(source, PrefillRequest) and not _is_short(source)
        return is_long and sequence.prefix is self._nothing

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

    def _feed(self, joining: list[Sequence]) -> None:
        """Run the queries of some sequences, and choose their first tokens."""
        sequences = _ordered(joining)
        began = self._engine._now()
        try:
            logits = run_pack(self._engine, sequences)
        except Exception as error:
            if self._group.world_size > 1:
                raise
            for one in sequences:
                self._end(one, error)
            return
        self._joining = [one for one in self._joining if one not in sequences]
        self._running += sequences
        self._choose(sequences, logits)
        seconds = self._engine._now() - began
        self.stats.query_s += seconds
        for one in sequences:
            one.handle.query_s = seconds
            one.handle.answered()

    # --- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Give every sequence its next token."""
        if not self._running:
            return
        began = self._engine._now()
        sequences = self._running = _ordered(self._running)
        logits = run_pack(self._engine, sequences)
        self._choose(list(sequences), logits)
        seconds = self._engine._now() - began
        self.stats.decode_s += seconds
        for one in sequences:
            one.handle.decode_s += seconds

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Choose each sequence's token on the first rank, tell all ranks, and end those that have ended."""
        failures: dict[int, BaseException] = {}
        chosen = self._chosen(sequences, logits, failures) if self._group.is_first else []
        if self._group.world_size > 1:
            message = torch.zeros((len(sequences) + 1, 2), dtype=torch.int64)
            if self._group.is_first:
                message = torch.tensor([*chosen, (self._layers_to_next(), 0)])
            message = self._group.broadcast(message.to(self._engine.device))
            *chosen, (self._layers_left, _) = (tuple(row) for row in message.tolist())
        else:
            self._layers_left = self._layers_to_next()
        self._layers_since, self._began = 0, time.perf_counter()
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

    # --- memory, and prefill -----------------------------------------------------------------------------------------

    def _bytes_for(self, request: QueryRequest) -> int:
        """Return the most bytes that a request needs on a rank."""
        source = request.source
        needed = self._pool.bytes_for(_forwards(request), getattr(source, "suffix", None))
        if isinstance(source, PrefillRequest) and not _is_short(source):
            plan = source.plan
            needed += max(self._pool.document_bytes(plan.shard_length(rank)) for rank in range(plan.world_size))
        return needed

    def _prefill(self, request: PrefillRequest, key: str, progress: OnProgress | None) -> Context:
        """Prefill a document, with steps between its layers."""

        def between_layers(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            self._layers_since += 1
            self._layers_left -= 1
            if self._layers_left > 0 or self._failure is not None or not self._running:
                return
            self._layers_s = self._engine._now() - self._began
            try:
                self._decode()
            except torch.OutOfMemoryError as error:
                if self._group.world_size > 1:
                    raise
                self._failure = error  # raised by the next step: the prefill goes on

        self._layers_since, self._began = 0, time.perf_counter()
        context = self._engine._run_prefill(request, key, between_layers)
        self.stats.prefill_s += context.prefill_s
        return context

    def _layers_to_next(self) -> int:
        """Return after how many layers of a prefill the next step is due, on the first rank."""
        if self._layers_since == 0:
            return 1
        return max(1, int(self._step_every_s * self._layers_since / max(self._layers_s, 1e-6)))


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
    elif _is_short(source):
        fed += source.document_ids.shape[1]
    return [fed] + [1] * (request.num_new - 1)


def _is_short(source: PrefillRequest) -> bool:
    return source.plan.exact and source.document_ids.shape[1] <= SHORT_DOCUMENT_TOKENS
