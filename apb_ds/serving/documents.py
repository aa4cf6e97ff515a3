"""The cache of documents as the first rank keeps books of it: what is where, how large, and what has to go.

Documents that were used least recently go from the device to host memory, from there to disk, and from there away; one
in use stays. A conversation about a document is on the device, and freed when the document leaves it. A document that
came back from disk keeps its file, until others need its room, and is not written again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import StrEnum

from apb_ds.serving.commands import Command, Drop, DropFile, Forget, ToDevice, ToDisk, ToHost


class Place(StrEnum):
    """Where a document is."""

    NOWHERE = "nowhere"
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(eq=False)
class Conversation:
    """Turns about a document, kept on the device.

    Attributes
    ----------
    ids : of the turns so far, as bytes of int64
    num_bytes : on the rank that stores most of them
    is_busy : whether a request goes on with it
    """

    number: int
    ids: bytes = b""
    num_bytes: int = 0
    is_busy: bool = True
    used: int = 0


@dataclass(eq=False)
class Document:
    """A document that is or was asked about.

    Attributes
    ----------
    num_bytes : on the rank that stores most of it
    uses : requests under way that need it on the device, and one more while it waits to be loaded
    has_file : whether it is on disk, wherever else it is
    """

    key: str
    num_tokens: int
    num_bytes: int
    place: Place = Place.NOWHERE
    uses: int = 0
    used: int = 0
    has_file: bool = False
    conversations: list[Conversation] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """Bytes on each rank: of documents by place, and of conversations."""

    device: int
    host: int
    disk: int
    conversations: int


class Documents:
    """The documents of a server, by key.

    Parameters
    ----------
    limits : Limits
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._documents: dict[str, Document] = {}
        self._clock = itertools.count(1)
        self._numbers = itertools.count(1)

    def get(self, key: str) -> Document | None:
        """Return a document, None if it is not known."""
        return self._documents.get(key)

    def add(self, key: str, num_tokens: int, num_bytes: int, place: Place = Place.NOWHERE) -> Document:
        """Enter a document that is not known yet."""
        has_file = place is Place.DISK
        document = Document(key, num_tokens, num_bytes, place, used=next(self._clock), has_file=has_file)
        self._documents[key] = document
        return document

    def touch(self, document: Document) -> None:
        """Note that a document is used now."""
        document.used = next(self._clock)

    def forget(self, document: Document) -> None:
        """Strike a document off the books."""
        if self._documents.get(document.key) is document:
            del self._documents[document.key]
        document.place, document.has_file = Place.NOWHERE, False

    def at(self, place: Place) -> list[Document]:
        """Return the documents at a place, those first that were used least recently."""
        return sorted((one for one in self._documents.values() if one.place is place), key=lambda one: one.used)

    def bytes_at(self, place: Place) -> int:
        """Return the bytes that a place holds, of each rank; the disk also holds files of documents in memory."""
        return sum(one.num_bytes for one in (self.files() if place is Place.DISK else self.at(place)))

    def files(self) -> list[Document]:
        """Return the documents with a file: first those that are in memory, too, then by when they were used last."""
        found = [one for one in self._documents.values() if one.has_file]
        return sorted(found, key=lambda one: (one.place is Place.DISK, one.used))

    # --- documents ---------------------------------------------------------------------------------------------------

    def room_for(self, document: Document) -> list[Command] | None:
        """Make room for a document on the device; return what all ranks must do, None if there is none yet.

        The books say at once where things will be.
        """
        document.uses += 1  # it may be in host memory or on disk, and is to stay there until it is loaded
        try:
            allowed = self.limits.device - document.num_bytes
            leaving = _least_to_leave(self.at(Place.DEVICE), Place.DEVICE, allowed)
            if leaving is None:
                return None
            return [command for one in leaving for command in self._leave_device(one)]
        finally:
            document.uses -= 1

    def to_device(self, document: Document) -> Command:
        """Return how a document comes back from host memory or disk; say afterwards that it `is_on_device`."""
        return ToDevice(document.key, from_disk=document.place is Place.DISK)

    def _leave_device(self, document: Document) -> list[Command]:
        commands: list[Command] = [Forget(one.number) for one in document.conversations]
        document.conversations.clear()
        room = self._room_on_host(document)
        if room is not None:
            document.place = Place.HOST
            return [*commands, *room, ToHost(document.key)]
        return [*commands, *self._leave_memory(document)]

    def _room_on_host(self, document: Document) -> list[Command] | None:
        leaving = _least_to_leave(self.at(Place.HOST), Place.HOST, self.limits.host - document.num_bytes)
        if leaving is None:
            return None
        return [command for one in leaving for command in self._leave_memory(one)]

    def _leave_memory(self, document: Document) -> list[Command]:
        if document.has_file:
            document.place = Place.DISK
            return [ToDisk(document.key, has_file=True)]
        leaving = _least_to_leave(self.files(), Place.DISK, self.limits.disk - document.num_bytes)
        if leaving is None:
            self.forget(document)
            return [Drop(document.key)]
        commands = [self._leave_disk(one) for one in leaving]
        document.place, document.has_file = Place.DISK, True
        return [*commands, ToDisk(document.key)]

    def keep_next(self) -> list[Command]:
        """Return what writes the document that was used last of those that are in memory alone and find room on disk.

        None must be in use. It leaves memory; files of documents that were used earlier make room for it.
        """
        unwritten = [one for one in self._documents.values() if not one.has_file]
        in_memory = [one for one in unwritten if one.place in (Place.DEVICE, Place.HOST)]
        for document in sorted(in_memory, key=lambda one: one.used, reverse=True):
            later = sum(one.num_bytes for one in self.files() if one.used > document.used)
            if later + document.num_bytes <= self.limits.disk:
                commands: list[Command] = [Forget(one.number) for one in document.conversations]
                document.conversations.clear()
                return [*commands, *self._leave_memory(document)]
        return []

    def _leave_disk(self, document: Document) -> Command:
        if document.place is Place.DISK:
            self.forget(document)
            return Drop(document.key)
        document.has_file = False
        return DropFile(document.key)

    # --- conversations -----------------------------------------------------------------------------------------------

    def begin_conversation(self, document: Document) -> Conversation:
        """Begin a conversation, in which a request under way is kept."""
        conversation = Conversation(next(self._numbers))
        document.conversations.append(conversation)
        return conversation

    def find_conversation(self, document: Document, ids: bytes) -> Conversation | None:
        """Return the longest conversation that a prompt goes on with; `ids` are what follows the document."""
        found = [
            one
            for one in document.conversations
            if not one.is_busy and len(one.ids) < len(ids) and ids.startswith(one.ids)
        ]
        return max(found, key=lambda one: len(one.ids), default=None)

    def end_turn(self, document: Document, conversation: Conversation, ids: bytes, num_bytes: int) -> list[Command]:
        """Keep a conversation with the turn that has ended; return which others to free for it."""
        conversation.ids, conversation.num_bytes, conversation.is_busy = ids, num_bytes, False
        conversation.used = next(self._clock)
        idle = [(one.used, of, one) for of in self._documents.values() for one in of.conversations if not one.is_busy]
        total = sum(one.num_bytes for _, _, one in idle)
        commands: list[Command] = []
        for _, of, one in sorted(idle, key=lambda item: item[0]):
            if total <= self.limits.conversations:
                break
            total -= one.num_bytes
            of.conversations.remove(one)
            commands.append(Forget(one.number))
        return commands

    def drop_conversation(self, document: Document, conversation: Conversation) -> Command:
        """Strike a conversation off the books; return how it is freed."""
        document.conversations.remove(conversation)
        return Forget(conversation.number)


def _least_to_leave(documents: list[Document], place: Place, allowed: int) -> list[Document] | None:
    """Return which documents to move so that the others fit; None if even all that can go do not suffice.

    What is in use at the place stays.
    """
    if allowed < 0:
        return None
    total = sum(one.num_bytes for one in documents)
    leaving = []
    for one in documents:
        if total <= allowed:
            break
        if one.uses == 0 or one.place is not place:
            leaving.append(one)
            total -= one.num_bytes
    return leaving if total <= allowed else None
