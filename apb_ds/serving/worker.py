"""The server's loop on every rank: the first rank says what to do, and all ranks do it, step by step."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apb_ds.engine.context import Branch, Context
from apb_ds.engine.engine import APBEngine
from apb_ds.engine.sequences import Cancelled, Handle
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.serving.commands import (
    Abandon,
    Ask,
    Command,
    Drop,
    DropFile,
    Forget,
    Prefill,
    Stop,
    ToDevice,
    ToDisk,
    ToHost,
)
from apb_ds.serving.host_memory import return_freed_memory
from apb_ds.serving.prompts import key_of
from apb_ds.serving.service import Service

# While nobody asks, the ranks meet this often.
HEARTBEAT_S = 1.0
ABANDONED = "nobody waits for the document any more."

logger = logging.getLogger(__name__)


class Worker:
    """One rank of the server.

    Parameters
    ----------
    control : the engine's ranks, as a group whose messages need no GPU
    service : on the first rank only
    max_sequences, max_bytes, step_every_s : of the batch
    cache_dir : where documents go on disk, the same folder for all ranks
    """

    def __init__(
        self,
        engine: APBEngine,
        control: SequenceGroup,
        service: Service | None,
        *,
        max_sequences: int,
        max_bytes: int,
        step_every_s: float,
        cache_dir: Path | None = None,
    ) -> None:
        self._engine = engine
        self._control = control
        self._service = service
        self._cache_dir = cache_dir
        self._batch = engine.batch(
            max_sequences, max_bytes=max_bytes, step_every_s=step_every_s, on_pause=partial(self._obey, is_loading=True)
        )
        self._contexts: dict[str, Context] = {}
        self._conversations: dict[int, Branch] = {}
        self._is_told_to_stop = threading.Event()
        self._has_ended = False
        self._is_prefilling = False
        self._step_has_failed = False

    def stop(self) -> None:
        """Have the server end, whichever rank this is; from any thread."""
        self._is_told_to_stop.set()
        if self._service is not None:
            self._service.stop()

    def run(self) -> None:
        """Serve until the first rank says stop."""
        with self._batch:
            while not self._has_ended:
                self._obey()
                if len(self._batch):
                    self._step()

    def _step(self) -> None:
        try:
            self._batch.step()
        except torch.OutOfMemoryError as error:
            # Nothing has changed: the answer that began last goes, and the others go on.
            handle = None if self._control.world_size > 1 or self._service is None else self._service.shed(error)
            if handle is None:
                raise
            self._batch.cancel(handle)

    def _obey(self, *, is_loading: bool = False) -> None:
        """Do what the first rank says. All ranks call this together."""
        service = self._service
        commands: list[Command] = []
        if service is not None:
            commands = service.next_commands(is_loading=is_loading, is_idle=len(self._batch) == 0, wait_s=HEARTBEAT_S)
        if self._control.world_size > 1:
            everyone = self._control.gather_objects((commands, self._is_told_to_stop.is_set()))
            commands = everyone[0][0]
            if service is not None and any(stop for _, stop in everyone):
                service.stop()
        for command in commands:
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case Ask():
                self._ask(command)
            case Prefill() | ToDevice():
                self._load(command)
            case Forget(number):
                conversation = self._conversations.pop(number, None)
                if conversation is not None:
                    conversation.free()
            case ToHost(key):
                self._leave(key, lambda context: context.to_host(while_waiting=self._pausing()))
            case ToDisk(key, has_file):
                path = self._path(key)
                if has_file:
                    self._touch(key)
                else:
                    self._leave(key, lambda context: context.save(path, while_waiting=self._pausing()))
                self._contexts.pop(key, None)
                return_freed_memory()
            case DropFile(key):
                self._remove(key)
            case Drop(key):
                if self._contexts.pop(key, None) is not None:
                    return_freed_memory()
                self._remove(key)
            case Abandon(write):
                if write or self._is_prefilling:  # what is copied or read comes to its end
                    raise Cancelled(ABANDONED)
            case Stop():
                self._has_ended = True
                self._touch_files()

    def _ask(self, command: Ask) -> None:
        service = self._service
        options: dict[str, Any] = {"max_new_tokens": command.num_new, "seed": command.seed}
        if service is not None:
            options |= service.arguments_of(command.number)
            options["on_end"] = partial(self._ended, command.number)
        ids = command.ids.to(self._engine.device)
        try:
            if command.conversation is None:
                handle = self._batch.submit(ids[:, 1:], document_ids=ids[:, :1], **options)
            else:
                branch = self._conversations.get(command.conversation)
                if branch is None:
                    branch = self._conversations[command.conversation] = self._contexts[command.key].branch()
                handle = self._batch.submit(ids, context=branch, append=True, **options)
        except ValueError as error:  # the same on every rank
            if service is not None:
                service.refused(command.number, error)
            return
        if service is not None:
            service.asked(command.number, handle)

    def _ended(self, number: int, handle: Handle) -> None:
        assert self._service is not None
        if handle.error is not None:
            handle.error.__traceback__ = None  # its frames hold other sequences, and with them their documents
        self._service.ended(number, handle, self._turns_of)

    def _turns_of(self, number: int) -> tuple[bytes, int]:
        """Return a conversation's ids, with the document's, as bytes of int64, and the bytes of its slots."""
        branch = self._conversations[number]
        return branch.token_ids.cpu().numpy().tobytes(), self._engine.pool.bytes_for([], branch.suffix)

    # --- documents ---------------------------------------------------------------------------------------------------

    def _load(self, command: Prefill | ToDevice) -> None:
        """Bring a document to the device; steps run inside a prefill."""
        service = self._service
        progress = None if service is None else service.progress
        began = self._engine._now()
        self._is_prefilling = isinstance(command, Prefill)
        try:
            if isinstance(command, Prefill):
                ids = command.ids.to(self._engine.device)
                context = self._batch.prefill(ids, max_positions=command.max_positions, new_tokens=0, progress=progress)
            elif command.from_disk:
                context = self._engine.load_context(
                    self._path(command.key), new_tokens=0, while_waiting=self._pausing()
                )
                if key_of(context.token_ids[0].cpu()) != command.key:
                    raise ValueError(f"{self._path(command.key)} holds another document than its name says.")
            else:
                context = self._contexts[command.key]
                context.to_device(while_waiting=self._pausing())
        except (Cancelled, ValueError, OSError, RuntimeError) as error:
            known = isinstance(command, ToDevice) or isinstance(error, (Cancelled, ValueError))
            known = known and not self._step_has_failed
            if not known and not (self._control.world_size == 1 and is_out_of_memory(error)):
                raise  # perhaps on this rank only, and the others are in a collective
            if service is not None:
                if not isinstance(error, Cancelled):
                    logger.warning("a document could not be loaded: %s", error)
                service.load_failed(error)
            return
        finally:
            self._is_prefilling = False
        self._contexts[command.key] = context
        if isinstance(command, ToDevice) and command.from_disk:
            self._touch(command.key)
        if service is not None:
            service.loaded(context.num_bytes, self._engine._now() - began)

    def _leave(self, key: str, move: Callable[[Context], None]) -> None:
        """Move a document off the device; forget it where that fails, on every rank."""
        try:
            move(self._contexts[key])
        except (Cancelled, OSError, ValueError, RuntimeError) as error:  # the same on every rank: they tell each other
            if self._step_has_failed:
                raise
            self._contexts.pop(key, None)
            if self._service is not None:
                if not isinstance(error, Cancelled):
                    logger.warning("a document could not be kept: %s", error)
                self._service.lost(key)

    def _pausing(self) -> Callable[[], None]:
        """Return what is called while a document is copied, read or written, so that answers go on."""
        pause = self._batch.pausing()

        def step() -> None:
            try:
                pause(0, 1)
            except Cancelled:
                raise
            except BaseException:
                self._step_has_failed = True
                raise

        return step

    def _path(self, key: str) -> Path:
        assert self._cache_dir is not None
        return self._cache_dir / key

    def _touch(self, key: str) -> None:
        """Note in a document's file that it is used now, for a later server."""
        if self._service is not None:
            with contextlib.suppress(OSError):
                os.utime(self._path(key))

    def _touch_files(self) -> None:
        """Put the files in the order in which documents were used, in which the next server takes them over."""
        if self._cache_dir is not None and self._service is not None:
            for document in self._service.documents.files():
                self._touch(document.key)

    def _remove(self, key: str) -> None:
        if self._cache_dir is not None and self._service is not None:
            shutil.rmtree(self._path(key), ignore_errors=True)
