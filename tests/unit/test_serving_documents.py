"""The books of the document cache: what leaves for where, and that nothing in use does."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from apb_ds.serving.commands import Command, Drop, DropFile, Forget, ToDevice, ToDisk, ToHost
from apb_ds.serving.documents import Document, Documents, Limits, Place


def books(device: int = 20, host: int = 0, disk: int = 0, conversations: int = 100) -> Documents:
    return Documents(Limits(device, host, disk, conversations))


def load(documents: Documents, key: str, num_bytes: int = 10) -> list[Command] | None:
    document = documents.get(key) or documents.add(key, num_bytes, num_bytes)
    documents.touch(document)
    commands = documents.room_for(document)
    if commands is not None:
        document.place = Place.DEVICE
    return commands


def keys(documents: Documents, place: Place) -> list[str]:
    return [one.key for one in documents.at(place)]


def test_the_least_recently_used_document_leaves() -> None:
    documents = books()
    assert load(documents, "a") == [] and load(documents, "b") == []
    documents.touch(found(documents, "a"))
    assert load(documents, "c") == [Drop("b")]
    assert keys(documents, Place.DEVICE) == ["a", "c"] and documents.get("b") is None


def test_documents_go_to_host_memory_then_to_disk_then_away() -> None:
    documents = books(device=10, host=10, disk=10)
    assert load(documents, "a") == []
    assert load(documents, "b") == [ToHost("a")]
    assert load(documents, "c") == [ToDisk("a"), ToHost("b")]
    assert load(documents, "d") == [Drop("a"), ToDisk("b"), ToHost("c")]
    assert [keys(documents, place) for place in (Place.DEVICE, Place.HOST, Place.DISK)] == [["d"], ["c"], ["b"]]


def test_without_host_memory_they_go_to_disk() -> None:
    documents = books(device=10, disk=10)
    load(documents, "a")
    assert load(documents, "b") == [ToDisk("a")]


def test_a_document_too_large_for_a_place_skips_it() -> None:
    documents = books(device=20, host=5, disk=20)
    load(documents, "a")
    assert load(documents, "b", 20) == [ToDisk("a")]


def test_one_comes_back_from_where_it_is() -> None:
    documents = books(device=10, host=10, disk=10)
    for key in "abc":
        load(documents, key)
    assert documents.to_device(found(documents, "a")) == ToDevice("a", from_disk=True)
    assert documents.to_device(found(documents, "b")) == ToDevice("b", from_disk=False)


def test_one_that_came_back_from_disk_is_not_written_again() -> None:
    documents = books(device=10, disk=20)
    load(documents, "a")
    assert load(documents, "b") == [ToDisk("a")]
    assert load(documents, "a") == [ToDisk("b")]
    assert documents.bytes_at(Place.DISK) == 20  # the file of a counts
    assert load(documents, "b") == [ToDisk("a", has_file=True)]
    assert load(documents, "a") == [ToDisk("b", has_file=True)]


def test_files_of_documents_in_memory_are_the_first_to_go() -> None:
    documents = books(device=20, disk=30)
    for key in "abcde":
        load(documents, key)
    assert load(documents, "a") == [Drop("b"), ToDisk("d")]
    found(documents, "a").uses = 1  # keeps it on the device, not its file
    assert load(documents, "f") == [DropFile("a"), ToDisk("e")]
    assert keys(documents, Place.DISK) == ["c", "d", "e"]  # c was used before a, and is on disk alone
    found(documents, "a").uses = 0
    assert load(documents, "g") == [Drop("c"), ToDisk("a")]


def test_one_in_use_stays_and_others_wait() -> None:
    documents = books(device=20)
    load(documents, "a")
    load(documents, "b")
    found(documents, "a").uses = 1
    assert load(documents, "c") == [Drop("b")]
    found(documents, "c").uses = 1
    assert load(documents, "d") is None
    assert keys(documents, Place.DEVICE) == ["a", "c"] and found(documents, "d").place is Place.NOWHERE
    found(documents, "a").uses = 0
    assert load(documents, "d") == [Drop("a")]


def test_one_that_comes_back_is_not_pushed_out_before() -> None:
    documents = books(device=10, host=10, disk=0)
    load(documents, "a")
    load(documents, "b")
    assert found(documents, "a").place is Place.HOST
    assert load(documents, "a") == [Drop("b")]  # there is no room for it beside a


def test_conversations_leave_with_their_document() -> None:
    documents = books(device=10, host=10)
    load(documents, "a")
    conversation = documents.begin_conversation(found(documents, "a"))
    documents.end_turn(found(documents, "a"), conversation, b"12", 5)
    assert load(documents, "b") == [Forget(conversation.number), ToHost("a")]
    assert found(documents, "a").conversations == []


def test_a_prompt_goes_on_with_the_longest_conversation_that_it_begins_with() -> None:
    documents = books()
    load(documents, "a")
    document = found(documents, "a")
    for ids in (b"1", b"12", b"13", b"1234"):
        documents.end_turn(document, documents.begin_conversation(document), ids, 1)
    going_on = documents.find_conversation(document, b"1239")
    assert going_on is not None and going_on.ids == b"12"
    going_on.is_busy = True
    other = documents.find_conversation(document, b"1239")
    assert other is not None and other.ids == b"1"
    assert documents.find_conversation(document, b"1") is None  # nothing would be left to ask
    assert documents.find_conversation(document, b"2") is None


def test_the_oldest_conversations_make_room_for_new_turns() -> None:
    documents = books(conversations=10)
    load(documents, "a")
    document = found(documents, "a")
    first, second, busy = (documents.begin_conversation(document) for _ in range(3))
    assert documents.end_turn(document, first, b"1", 6) == []
    assert documents.end_turn(document, second, b"2", 6) == [Forget(first.number)]
    assert document.conversations == [second, busy]
    assert documents.end_turn(document, busy, b"3", 11) == [Forget(second.number), Forget(busy.number)]


def found(documents: Documents, key: str) -> Document:
    document = documents.get(key)
    assert document is not None
    return document


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), max_size=40),
    st.tuples(st.integers(8, 30), st.integers(0, 20), st.integers(0, 20)),
)
def test_the_books_agree_with_what_the_commands_do(events: list[tuple[int, int]], sizes: tuple[int, int, int]) -> None:
    """Whatever is asked: no place holds more than its limit, and each command finds its document where it must be."""
    documents = Documents(Limits(*sizes, conversations=5))
    places: dict[str, Place] = {}
    files: set[str] = set()
    for number, uses in events:
        key = str(number)
        commands = load(documents, key, number + 2)
        document = documents.get(key)
        assert document is not None
        for command in commands or []:
            match command:
                case ToHost(other):
                    assert places[other] is Place.DEVICE
                    places[other] = Place.HOST
                case ToDisk(other, has_file):
                    assert places[other] in (Place.DEVICE, Place.HOST) and has_file == (other in files)
                    places[other] = Place.DISK
                    files.add(other)
                case DropFile(other):
                    assert places[other] in (Place.DEVICE, Place.HOST)
                    files.remove(other)
                case Drop(other):
                    del places[other]
                    files.discard(other)
        if commands is not None:
            places[key] = Place.DEVICE
            document.uses = uses
        elif document.place is Place.NOWHERE:
            documents.forget(document)
        if uses == 0:
            for one in documents.at(Place.DEVICE):
                one.uses = 0
        assert {one.key: one.place for place in Place for one in documents.at(place)} == places
        assert documents.bytes_at(Place.DISK) == sum(int(one) + 2 for one in files)
        for place, limit in zip((Place.DEVICE, Place.HOST, Place.DISK), sizes, strict=True):
            assert documents.bytes_at(place) <= limit
