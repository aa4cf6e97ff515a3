"""The first rank's side of the server: takes requests from HTTP's threads, and decides what all ranks do next."""

from __future__ import annotations

import bisect
import functools
import itertools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from apb_ds.cache import first_capacity
from apb_ds.engine.engine import APBEngine
from apb_ds.engine.generation_settings import check_generate_arguments
from apb_ds.engine.sequences import Cancelled, Handle
from apb_ds.hf.rotary import check_reach
from apb_ds.plan import plan_request
from apb_ds.serving.answers import Answer
from apb_ds.serving.commands import Abandon, Ask, Command, Drop, Prefill, Stop
from apb_ds.serving.config import ServeConfig
from apb_ds.serving.documents import Conversation, Document, Documents, Place
from apb_ds.serving.errors import ApiError, busy, failed, unavailable
from apb_ds.serving.prompts import Prompts, too_long
from apb_ds.serving.requests import Ended, Failed, Listener, Message, Options, Progress, Prompt

if TYPE_CHECKING:
    from apb_ds.serving.metrics import Metrics

# Positions for which a document's rotary frequencies are chosen, after its own, where a model's depend on that.
TURN_POSITIONS = 16384
NO_LIMIT = 2**24  # positions, where a model says nothing of them
RETRY_AFTER_S = 5
METRICS_EVERY_S = 0.5
STOPPING = "The server is stopping."


@dataclass(eq=False)
class Request:
    """A request under way; a `Ticket`.

    Attributes
    ----------
    answer : what chooses and reads its tokens
    arguments : of transformers' `generate`
    is_hit : whether its document was there already, or another request had asked for it
    is_asked : whether it is in the batch
    needs_document : whether it is counted among its document's uses
    """

    number: int
    prompt: Prompt
    num_new: int
    seed: int
    listener: Listener
    answer: Answer = field(init=False)
    arguments: dict[str, Any] = field(init=False)
    asked: float = field(default_factory=time.perf_counter)
    document: Document | None = None
    conversation: Conversation | None = None
    handle: Handle | None = None
    cached_tokens: int = 0
    prefill_s: float = 0.0
    is_hit: bool = True
    is_asked: bool = False
    needs_document: bool = False
    is_cancelled: bool = False

    def cancel(self) -> None:
        """End it at the next step. It gets no further events."""
        self.is_cancelled = True
        if self.handle is not None:
            self.handle.cancel()

    def tell(self, event: Any) -> None:
        """Pass an event on, unless nobody wants it any more."""
        if not self.is_cancelled:
            self.listener(event)


class Service:
    """Takes requests, and says what to do about them. See `Backend` for what HTTP calls, in any thread.

    The engine's thread calls the other methods.

    Parameters
    ----------
    name : of the model, as clients give it
    documents : the books of the document cache
    max_bytes : of the slots of answers under way, on each rank
    """

    def __init__(
        self,
        engine: APBEngine,
        tokenizer: Any,
        name: str,
        config: ServeConfig,
        documents: Documents,
        max_bytes: int,
        metrics: Metrics,
    ) -> None:
        self.on_stop: Callable[[], None] | None = None  # called once, when the server begins to end
        self.model_name = name
        self.created = int(time.time())
        self.tokenizer = tokenizer
        self.max_positions: int | None = getattr(
            engine.module.config.get_text_config(), "max_position_embeddings", None
        )
        self.documents = documents
        self.metrics = metrics
        self._engine = engine
        self._config = config
        self._max_bytes = max_bytes
        self._vocab_size = engine.module.get_input_embeddings().num_embeddings
        self._prompts = Prompts(
            tokenizer,
            config.min_document,
            config.split,
            config.max_rest,
            self.max_positions,
            self._vocab_size,
            config.template,
        )
        ends = engine.module.generation_config.eos_token_id
        self._end_tokens = frozenset([ends] if isinstance(ends, int) else ends or [])
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, Request] = {}
        self._inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stop_at: float | None = None
        self._error: ApiError | None = None
        # Of the engine's thread:
        self._new: list[Request] = []  # in order of arrival, until their documents are looked for
        self._ready: list[Request] = []  # whose document has been loaded for them
        self._num_asked = 0  # requests in the batch
        self._is_blocked = False  # the next document to load finds no room
        self._to_load: list[Document] = []
        self._waiting: dict[str, list[Request]] = {}  # for their documents, by key
        self._loading: Document | None = None
        self._said = 0.0  # when metrics were last set
        self._owed: list[Command] = []

    # --- for HTTP, in any thread -------------------------------------------------------------------------------------

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        return self._prompts.chat(messages)

    @property
    def min_document(self) -> int:
        """Tokens that make a document."""
        return self._config.min_document

    @functools.cached_property
    def longest_document(self) -> int:
        """Tokens of the longest document that is served."""
        positions = self.max_positions or NO_LIMIT
        return bisect.bisect_right(range(positions), self.documents.limits.device, lo=1, key=self._document_bytes) - 1

    def text_prompt(self, text: str | Sequence[int]) -> Prompt:
        return self._prompts.text(text)

    def submit(self, prompt: Prompt, options: Options, listener: Listener) -> Request:
        param = "prompt" if options.continues else "messages"
        num_new = self._num_new(prompt, options, param)
        self._check_memory(prompt, num_new, param)
        if any(token >= self._vocab_size for token in options.logit_bias):
            raise ApiError(400, f"logit_bias has a token id above {self._vocab_size - 1}.", param="logit_bias")
        seed = secrets.randbits(63) if options.seed is None else options.seed % 2**63
        request = Request(next(self._numbers), prompt, num_new, seed, listener)
        request.answer = Answer(self.tokenizer, options, request.tell, end_tokens=self._end_tokens)
        try:
            arguments = request.answer.arguments(self._engine.module.generation_config)
            request.arguments = check_generate_arguments(self._engine.module, arguments)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._stop_at is not None:
                raise unavailable(STOPPING)
            if len(self._open) >= self._config.max_sequences + self._config.max_waiting:
                raise busy(f"{len(self._open)} requests are under way or waiting; try again later.", RETRY_AFTER_S)
            self._open[request.number] = request
        self._inbox.put(request)
        self._wake.set()
        return request

    def health(self) -> dict[str, Any]:
        status = "failed" if self._error is not None else "ok" if self._stop_at is None else "stopping"
        running = sum(one.handle is not None for one in self._requests())
        return {"status": status, "running": running, "waiting": len(self._open) - running}

    def stop(self) -> None:
        """Take no further requests, and end when those under way have ended, or after the time that they get."""
        with self._lock:
            is_first = self._stop_at is None
            if is_first:
                self._stop_at = time.monotonic() + self._config.stop_s
        self._wake.set()
        if is_first and self.on_stop is not None:
            self.on_stop()

    def fail(self, error: ApiError) -> None:
        """End all requests with an error: the engine is gone."""
        with self._lock:
            self._error = error
            requests = list(self._open.values())
            self._open.clear()
        for request in requests:
            request.tell(Failed(error))
            request.is_cancelled = True

    def _requests(self) -> list[Request]:
        with self._lock:
            return list(self._open.values())

    def _num_new(self, prompt: Prompt, options: Options, param: str) -> int:
        """Return how many tokens the answer may have."""
        asked = options.max_new_tokens
        wanted = self._config.default_new_tokens if asked is None else asked
        if self.max_positions is not None:
            left = self.max_positions - prompt.num_tokens
            if left < 1 or (asked is not None and asked > left):
                raise too_long(self.max_positions, prompt.num_tokens, asked, param if left < 1 else "max_tokens")
            wanted = min(wanted, left)
        return wanted

    def _check_memory(self, prompt: Prompt, num_new: int, param: str) -> None:
        """Refuse what would never fit."""
        num_document = len(prompt.document)
        try:
            if num_document:
                check_reach(self._engine.module, self._reach(num_document), prompt.num_tokens + num_new)
        except ValueError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error
        needed = self._engine.pool.bytes_for([len(prompt.rest)] + [1] * (num_new - 1))
        if needed > self._max_bytes:
            raise ApiError(
                400,
                f"{len(prompt.rest)} tokens after the document and {num_new} new ones need {needed / 2**20:.0f} MiB; "
                f"the server has {self._max_bytes / 2**20:.0f} MiB for them. Ask for fewer tokens.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if num_document:
            needed = self._document_bytes(num_document)
            if needed > self.documents.limits.device:
                raise ApiError(
                    400,
                    f"A document of {num_document} tokens needs {needed / 2**20:.0f} MiB; of serve.device_gib, "
                    f"{self.documents.limits.device / 2**20:.0f} MiB are for documents, and the longest that fits has "
                    f"{self.longest_document} tokens.",
                    param=param,
                    code="context_length_exceeded",
                )

    def _document_bytes(self, num_tokens: int) -> int:
        return document_bytes(self._engine, num_tokens)

    def _reach(self, num_document: int) -> int:
        """Return the positions that a document's context serves."""
        reach = num_document + TURN_POSITIONS
        return reach if self.max_positions is None else max(num_document, min(reach, self.max_positions))

    # --- for the engine's thread: what comes next --------------------------------------------------------------------

    def next_commands(self, *, is_loading: bool, is_idle: bool, wait_s: float) -> list[Command]:
        """Return what all ranks do next.

        Parameters
        ----------
        is_loading : whether this is a pause in a prefill
        is_idle : whether no sequence is under way
        wait_s : seconds to wait at most if there is nothing to do
        """
        if is_idle and not is_loading and not (self._new or self._ready or self._to_load or self._owed):
            self._wake.wait(wait_s)
        self._wake.clear()
        self._say_what_there_is()
        while not self._inbox.empty():
            self._new.append(self._inbox.get())
        if self._is_over():
            self._cancel_rest()
        self._forget_cancelled()
        commands, self._owed = self._owed, []
        commands += self._asks()
        if is_loading:
            if self._loading is None:  # only a server that stops writes what it does not need the room of
                return [*commands, Abandon(write=True)] if self._is_over() else commands
            return commands if self._waiting.get(self._loading.key) else [*commands, Abandon()]
        if self._stop_at is None:
            commands += self._load_next()
        else:
            self._refuse_waiting()
        if self._stop_at is not None and is_idle and not commands and not self._open:
            to_keep = [] if self._is_over() else self.documents.keep_next()
            return to_keep or [Stop()]
        return commands

    def _say_what_there_is(self) -> None:
        """Keep the metrics true, now and then."""
        if time.monotonic() < self._said + METRICS_EVERY_S:
            return
        self._said = time.monotonic()
        health = self.health()
        self.metrics.set_requests(health["running"], health["waiting"])
        places = {place: self.documents.at(place) for place in (Place.DEVICE, Place.HOST, Place.DISK)}
        self.metrics.set_documents(
            {place: (len(found), self.documents.bytes_at(place)) for place, found in places.items()}
        )

    def _is_over(self) -> bool:
        return self._stop_at is not None and time.monotonic() > self._stop_at

    def _refuse_waiting(self) -> None:
        """Tell those whose documents would still have to be loaded that the server stops."""
        for request in itertools.chain(*self._waiting.values()):
            request.tell(Failed(unavailable(STOPPING)))
            request.cancel()

    def _cancel_rest(self) -> None:
        for request in self._requests():
            if not request.is_cancelled:
                request.tell(Failed(unavailable(STOPPING)))
                request.cancel()

    def _forget_cancelled(self) -> None:
        """Forget requests that were cancelled before they were asked."""
        for request in [*self._new, *self._ready, *itertools.chain(*self._waiting.values())]:
            if request.is_cancelled:
                self._release(request)
                self._close(request)
        self._new = [one for one in self._new if not one.is_cancelled]
        self._ready = [one for one in self._ready if not one.is_cancelled]
        for key, requests in list(self._waiting.items()):
            self._waiting[key] = [one for one in requests if not one.is_cancelled]
        for document in [one for one in self._to_load if not self._waiting.get(one.key)]:
            self._no_longer_to_load(document)
            self._waiting.pop(document.key, None)
            if document.place is Place.NOWHERE:
                self.documents.forget(document)

    def _no_longer_to_load(self, document: Document) -> None:
        """Take a document off those to load, where it is kept from leaving for elsewhere."""
        self._to_load = [one for one in self._to_load if one is not document]
        document.uses -= 1

    def _release(self, request: Request) -> None:
        """Note that a request needs its document no more."""
        if request.needs_document and request.document is not None:
            request.document.uses -= 1
        request.needs_document = False

    def _asks(self) -> list[Command]:
        """Ask what can be asked, and note which documents the other new requests need."""
        commands = []
        while self._ready and self._num_asked < self._config.max_sequences:
            request = self._ready.pop(0)
            commands.append(self._ask(request, request.document))
        later = []
        for request in self._new:
            document = self._document_of(request)
            if document is not None and document.place is not Place.DEVICE:
                self._wait_for(document, request)
            elif self._num_asked >= self._config.max_sequences or (document is not None and self._is_blocked):
                later.append(request)  # a document that waits for room does not wait for those that come later
            else:
                commands.append(self._ask(request, document))
        self._new = later
        return commands

    def _document_of(self, request: Request) -> Document | None:
        if not request.prompt.key:
            return None
        num_tokens = len(request.prompt.document)
        known = self.documents.get(request.prompt.key)
        if known is None:
            request.is_hit = False
            known = self.documents.add(request.prompt.key, num_tokens, self._document_bytes(num_tokens))
        self.documents.touch(known)
        return known

    def _wait_for(self, document: Document, request: Request) -> None:
        request.document = document
        self._waiting.setdefault(document.key, []).append(request)
        if document is not self._loading and document not in self._to_load:
            self._to_load.append(document)
            document.uses += 1

    def _ask(self, request: Request, document: Document | None) -> Command:
        """Return the command that asks a request about a document on the device, or about none."""
        rest = request.prompt.rest
        self._num_asked += 1
        request.is_asked = True
        if document is None:
            return Ask(request.number, "", rest.unsqueeze(0), request.num_new, None, request.seed)
        request.document = document
        if not request.needs_document:
            document.uses += 1
        request.needs_document = True
        ids = rest.numpy().tobytes()
        conversation = self.documents.find_conversation(document, ids)
        num_known = 0
        if conversation is None:
            conversation = self.documents.begin_conversation(document)
        else:
            conversation.is_busy = True
            num_known = len(conversation.ids) // rest.element_size()
        request.conversation = conversation
        # The last token of a turn that was kept is fed again.
        request.cached_tokens = max(0, num_known - 1) + (document.num_tokens if request.is_hit else 0)
        new = rest[num_known:].unsqueeze(0)
        return Ask(request.number, document.key, new, request.num_new, conversation.number, request.seed)

    def _load_next(self) -> list[Command]:
        """Return what brings the next document to the device, if there is room for it."""
        self._is_blocked = False
        if not self._to_load:
            return []
        document = self._to_load[0]
        room = self.documents.room_for(document)
        if room is None:
            self._is_blocked = True
            return []
        self._no_longer_to_load(document)
        self._loading = document
        if document.place is not Place.NOWHERE:
            return [*room, self.documents.to_device(document)]
        ids = self._waiting[document.key][0].prompt.document
        return [*room, Prefill(document.key, ids.unsqueeze(0), self._reach(len(ids)))]

    # --- for the engine's thread: what has happened ------------------------------------------------------------------

    def arguments_of(self, number: int) -> dict[str, Any]:
        """Return the arguments of `generate` for a request."""
        request = self._open.get(number)
        return {} if request is None else request.arguments

    def asked(self, number: int, handle: Handle) -> None:
        """Note that a request has joined the batch."""
        request = self._open.get(number)
        if request is None:
            handle.cancel()
            return
        request.handle = handle
        if request.is_cancelled:
            handle.cancel()

    def ended(self, number: int, handle: Handle, turns: Callable[[int], tuple[bytes, int]]) -> None:
        """Note that a request has ended.

        Parameters
        ----------
        turns : returns a conversation's ids, as bytes of int64, and what they take on a rank
        """
        request = self._open.get(number)
        if request is None or (isinstance(handle.error, Cancelled) and not request.is_cancelled):
            return  # an error ends the batch with all requests: `fail` tells them
        if handle.error is None:
            request.tell(
                Ended(
                    request.answer.reason(handle.tokens, request.num_new),
                    len(handle.tokens),
                    request.cached_tokens,
                    time.perf_counter() - request.asked - handle.decode_s,
                    request.prefill_s,
                    handle.query_s,
                    handle.decode_s,
                )
            )
        elif not isinstance(handle.error, Cancelled):
            request.tell(Failed(_as_api_error(handle.error)))
        self._end_turn(request, None if handle.error is not None else turns)
        self._close(request)

    def refused(self, number: int, error: Exception) -> None:
        """Note that a request could not be asked."""
        request = self._open.get(number)
        if request is not None:
            request.tell(Failed(_as_api_error(error)))
            self._end_turn(request, None)
            self._close(request)

    def _end_turn(self, request: Request, turns: Callable[[int], tuple[bytes, int]] | None) -> None:
        document, conversation = request.document, request.conversation
        if document is None or conversation is None:
            return
        self._release(request)
        if turns is not None:
            ids, num_bytes = turns(conversation.number)
            self._owed += self.documents.end_turn(document, conversation, ids[document.num_tokens * 8 :], num_bytes)
        elif conversation.ids:
            conversation.is_busy = False
        else:
            self._owed.append(self.documents.drop_conversation(document, conversation))

    def _close(self, request: Request) -> None:
        with self._lock:
            self._open.pop(request.number, None)
        if request.is_asked:
            self._num_asked -= 1
        request.is_asked = False
        request.handle = None  # which holds the document: a request is not freed at once

    def progress(self, done: int, total: int) -> None:
        """Tell those who wait for the document that is being loaded how far that is."""
        if self._loading is not None:
            for request in self._waiting.get(self._loading.key, []):
                request.tell(Progress(done, total))

    def loaded(self, num_bytes: int, seconds: float) -> None:
        """Note that the document is on the device."""
        document = self._loading
        assert document is not None
        source = "prefill" if document.place is Place.NOWHERE else str(document.place)
        self._loading = None
        document.place = Place.DEVICE
        document.num_bytes = max(self._document_bytes(document.num_tokens), num_bytes)
        waiting = self._waiting.pop(document.key, [])
        self.metrics.observe_load(source, seconds)
        for request in waiting:
            request.prefill_s = seconds
            request.needs_document = True
            document.uses += 1
        self._ready += waiting

    def load_failed(self, error: Exception) -> None:
        """Note that the document could not be loaded: it is nowhere."""
        document = self._loading
        assert document is not None
        self._loading = None
        waiting = self._waiting.pop(document.key, [])
        was_stored = document.place is not Place.NOWHERE
        self.documents.forget(document)
        if isinstance(error, Cancelled) or was_stored:  # it is prefilled again, or in place of being read
            self._owed.append(Drop(document.key))
            self._new[:0] = waiting
            return
        for request in waiting:
            request.tell(Failed(_as_api_error(error)))
            self._close(request)

    def lost(self, key: str) -> None:
        """Note that a document could not be kept."""
        document = self.documents.get(key)
        if document is None:
            return
        self.documents.forget(document)
        self._owed.append(Drop(key))  # it may have a file
        if document in self._to_load:
            self._no_longer_to_load(document)
        self._new[:0] = self._waiting.pop(key, [])

    def shed(self, error: torch.OutOfMemoryError) -> Handle | None:
        """Give up the answer that began last, since memory has run out; return what to cancel, if anything."""
        running = [one for one in self._requests() if one.handle is not None and one.handle.tokens]
        if not running:
            return None
        running[-1].tell(Failed(_as_api_error(error)))
        running[-1].cancel()
        return running[-1].handle


def document_bytes(engine: APBEngine, num_tokens: int) -> int:
    """Return the bytes of a document on the rank that stores most of it."""
    world_size = engine.attention.group.world_size
    plan = plan_request(engine.apb_config, num_tokens, 0, world_size)
    longest = max(plan.shard_length(rank) for rank in range(world_size))
    return engine.pool.document_bytes(first_capacity(longest))


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return failed(f"The server ran out of memory for this request: {error}")
    return failed(f"The request failed: {type(error).__name__}.")
