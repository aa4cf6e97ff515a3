"""The engine half of the server: answers as of `generate`, documents that are prefilled once, nothing left over."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from apb_ds.cache import first_capacity
from apb_ds.engine import saved
from apb_ds.engine.context import Context
from apb_ds.engine.engine import APBEngine
from apb_ds.serving.config import ServeConfig
from apb_ds.serving.documents import Documents, Limits, Place
from apb_ds.serving.errors import ApiError, failed
from apb_ds.serving.requests import Failed, Message, Options
from apb_ds.serving.run import take_over
from apb_ds.serving.service import document_bytes
from tests.serving import GREEDY, MIN_DOCUMENT, PLENTY, Client, make_half, running, tiny_engine

BOOKS = [f"{name} " * 20 for name in ("alpha", "beta", "gamma", "delta")]
QUESTIONS = [f"What about {thing}?" for thing in ("ants", "bees", "cats", "dogs", "eels")]


@pytest.fixture(scope="module")
def engine() -> Any:
    return tiny_engine()


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the documents that were prefilled."""
    found: list[int] = []
    run = APBEngine._run_prefill

    def counting(self: Any, request: Any, *args: Any) -> Any:
        found.append(request.document_ids.shape[1])
        return run(self, request, *args)

    monkeypatch.setattr(APBEngine, "_run_prefill", counting)
    return found


def test_answers_are_those_of_generate(engine: Any, prefills: list[int]) -> None:
    chats = [(book, question) for book in BOOKS[:2] for question in QUESTIONS] + [("Hello",), ("Hi there", "And?")]
    with running(engine) as half:
        clients = [half.ask(*chat) for chat in chats]
        ended = [client.wait() for client in clients]
        assert len(prefills) == 2
        expected = [half.expected(*chat) for chat in chats]
    assert [client.tokens for client in clients] == expected
    assert [one.new_tokens for one in ended] == [len(tokens) for tokens in expected]
    lengths = [one.request.prompt.num_tokens for one in clients]
    assert [one.cached_tokens > 0 for one in ended] == [False, *[True] * 4, False, *[True] * 4, False, False]
    assert all(one.cached_tokens < length for one, length in zip(ended, lengths, strict=True))


def test_two_requests_for_a_new_document_prefill_it_once(engine: Any, prefills: list[int]) -> None:
    with running(engine) as half:
        clients = [half.ask(BOOKS[0], question) for question in QUESTIONS[:2]]
        first, second = (client.wait() for client in clients)
    assert len(prefills) == 1
    document = len(clients[0].request.prompt.document)
    assert (first.cached_tokens, second.cached_tokens) == (0, document)
    assert clients[0].progress and clients[0].progress[-1].done == clients[0].progress[-1].total
    assert first.prefill_s > 0 and first.wait_s >= first.prefill_s


def test_a_conversation_goes_on_where_it_was(engine: Any, prefills: list[int]) -> None:
    letters = {ord(letter) - ord("!"): 50.0 for letter in "abcde"}  # their text tokenises as it was generated
    options = Options(max_new_tokens=6, temperature=0.0, logit_bias=letters)
    with running(engine) as half:
        turns: list[Message | str] = [BOOKS[0], QUESTIONS[0]]
        known: list[int] = []
        for question in QUESTIONS[1:4]:
            client = half.ask(*turns, options=options)
            ended = client.wait()
            assert client.tokens == half.expected(*turns, options=options) and len(client.text) == 6
            if known:
                assert ended.cached_tokens == known[-1] - 1
            known.append(client.request.prompt.num_tokens + len(client.tokens))
            turns += [Message("assistant", (client.text,)), question]
        again = half.ask(*turns[:-2], options=options)  # the last turn anew: only its document is found
        assert again.wait().cached_tokens == len(again.request.prompt.document)
        assert again.tokens == client.tokens
    assert prefills.count(prefills[0]) == 4  # of which three for what was expected


def test_sampling_depends_on_the_seed_alone(engine: Any) -> None:
    options = [Options(max_new_tokens=8, seed=seed) for seed in (1, 2, 1)]
    with running(engine) as half:
        clients = [half.ask(BOOKS[0], QUESTIONS[0], options=one) for one in options]
        for client in clients:
            client.wait()
    assert clients[0].tokens == clients[2].tokens != clients[1].tokens


def test_requests_join_and_are_cancelled_inside_a_prefill(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    with running(engine) as half:
        half.ask(BOOKS[0], QUESTIONS[0]).wait()
        progress = half.service.progress

        def slow(done: int, total: int) -> None:
            inside.set()
            if done == 1:
                assert go_on.wait(30)
            time.sleep(0.05)
            progress(done, total)

        monkeypatch.setattr(half.service, "progress", slow)
        long = half.ask(BOOKS[1] * 4, QUESTIONS[0])
        assert inside.wait(30)
        short = half.ask(BOOKS[0], QUESTIONS[1], options=Options(max_new_tokens=3, temperature=0.0))
        gone = half.ask(BOOKS[0], QUESTIONS[2], options=Options(max_new_tokens=500, temperature=0.0, ignore_eos=True))
        go_on.set()
        short.wait()
        assert not long.tokens  # its document is still being prefilled
        assert gone.has_token.wait(30)
        gone.request.cancel()
        long.wait()
        assert long.tokens == half.expected(BOOKS[1] * 4, QUESTIONS[0])
        number = len(gone.tokens)
    assert number < 500 and len(gone.tokens) == number and gone.events[-1] == gone.events[number - 1]


def test_a_prefill_that_nobody_waits_for_is_abandoned(
    engine: Any, prefills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = threading.Event()
    steps: list[int] = []
    with running(engine) as half:
        progress = half.service.progress

        def slow(done: int, total: int) -> None:
            inside.set()
            steps.append(done)
            time.sleep(0.1)
            progress(done, total)

        monkeypatch.setattr(half.service, "progress", slow)
        client = half.ask(BOOKS[0] * 4, QUESTIONS[0])
        assert inside.wait(30)
        client.request.cancel()
        other = half.ask(BOOKS[1], QUESTIONS[0])
        assert other.wait() and other.tokens == half.expected(BOOKS[1], QUESTIONS[0])
        assert half.service.documents.get(client.request.prompt.key) is None
    assert not client.tokens and len(prefills) == 3  # the abandoned one, the other's, and the expected one's


@pytest.mark.parametrize("places", ["host", "disk", "host and disk", "nowhere"])
def test_documents_leave_and_come_back(engine: Any, prefills: list[int], tmp_path: Path, places: str) -> None:
    size = engine.pool.document_bytes(first_capacity(200))
    limits = Limits(size, size if "host" in places else 0, 10 * size if "disk" in places else 0, 2**20)
    with running(engine, limits, tmp_path) as half:
        for book in [*BOOKS, *reversed(BOOKS)]:
            client = half.ask(book, QUESTIONS[0])
            client.wait()
            before = len(prefills)
            assert client.tokens == half.expected(book, QUESTIONS[0])
            del prefills[before:]
        known = half.service.documents
        assert known.bytes_at(Place.DEVICE) <= size
        at = {place: len(known.at(place)) for place in Place}
    assert at[Place.DEVICE] == 1
    assert len(prefills) == {"host": 6, "disk": 4, "host and disk": 4, "nowhere": 7}[places]


def test_a_document_is_written_once_while_there_is_room(
    engine: Any, prefills: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from apb_ds.engine import context

    written: list[str] = []
    save = context.save_context

    def saving(one: Any, path: Any, while_waiting: Any = None) -> None:
        written.append(Path(path).name)
        save(one, path, while_waiting)

    monkeypatch.setattr(context, "save_context", saving)
    size = engine.pool.document_bytes(first_capacity(200))
    with running(engine, Limits(2 * size, 0, 3 * size, 2**20), tmp_path) as half:
        keys = []
        for book in (*BOOKS[:3], *BOOKS[:3], BOOKS[0]):
            client = half.ask(book, QUESTIONS[0])
            client.wait()
            keys.append(client.request.prompt.key)
        assert written == keys[:3] and len(prefills) == 3
        assert [one.key for one in half.service.documents.at(Place.DISK)] == [keys[1]]
        assert half.service.documents.bytes_at(Place.DISK) == 3 * size
        half.ask(BOOKS[3], QUESTIONS[0]).wait()  # the document that leaves for it has a file
        half.ask(BOOKS[1], QUESTIONS[0]).wait()
        again = half.ask(BOOKS[2], QUESTIONS[0])  # the new one leaves, and takes the place of another's file
        again.wait()
        assert [*keys[:3], half.service.documents.at(Place.DISK)[-1].key] == written
        assert {path.name for path in tmp_path.iterdir()} == {one.key for one in half.service.documents.files()}
        assert again.tokens == half.expected(BOOKS[2], QUESTIONS[0])


def test_answers_go_on_while_a_document_is_written_and_read(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from apb_ds.engine import loaded, saved

    size = engine.pool.document_bytes(first_capacity(200))
    long = Options(max_new_tokens=2000, temperature=0.0, ignore_eos=True)
    counts: list[int] = []
    with running(engine, Limits(2 * size, 0, 10 * size, 2**20), tmp_path) as half:
        client = half.ask(BOOKS[0], QUESTIONS[0], options=long)
        assert client.has_token.wait(30)
        for owner, name in ((saved, "_write_shard"), (loaded.SavedContext, "read_into")):
            work = getattr(owner, name)

            def slow(*args: Any, work: Any = work, **options: Any) -> Any:
                before = len(client.tokens)
                deadline = time.monotonic() + 30
                while len(client.tokens) < before + 3 and time.monotonic() < deadline:
                    time.sleep(0.01)
                counts.append(len(client.tokens) - before)
                return work(*args, **options)

            monkeypatch.setattr(owner, name, slow)
        for book in (BOOKS[1], BOOKS[2], BOOKS[1]):
            other = half.ask(book, QUESTIONS[0])
            other.wait()
            client.events[:] = client.events[-1:]
        client.request.cancel()
        assert len(counts) == 3 and min(counts) >= 3  # two documents written, one read


def test_a_damaged_file_is_prefilled_again(engine: Any, prefills: list[int], tmp_path: Path) -> None:
    size = engine.pool.document_bytes(first_capacity(200))
    with running(engine, Limits(size, 0, 10 * size, 2**20), tmp_path) as half:
        half.ask(BOOKS[0], QUESTIONS[0]).wait()
        half.ask(BOOKS[1], QUESTIONS[0]).wait()
        (kept,) = tmp_path.iterdir()
        for file in kept.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-8])
        client = half.ask(BOOKS[0], QUESTIONS[0])
        client.wait()
        assert client.tokens == half.expected(BOOKS[0], QUESTIONS[0])
    assert len(prefills) == 4


def test_a_later_server_finds_the_documents_on_disk(engine: Any, prefills: list[int], tmp_path: Path) -> None:
    size = engine.pool.document_bytes(first_capacity(200))
    limits = Limits(size, 0, 10 * size, 2**20)
    with running(engine, limits, tmp_path) as half:
        for book in BOOKS[:3]:
            half.ask(book, QUESTIONS[0]).wait()
    bytes_of = partial(document_bytes, engine)
    left = [tmp_path / f".{'0' * 64}.0123.partial", tmp_path / ("0" * 64)]
    others = [tmp_path / "model", tmp_path / ".git"]  # of somebody else
    for path in (*left, *others):
        path.mkdir()
    documents = Documents(limits)
    lock = take_over(tmp_path, documents, bytes_of)
    assert len(documents.at(Place.DISK)) == 3 and documents.bytes_at(Place.DISK) == 3 * size
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    with pytest.raises(ValueError, match="another server"):
        take_over(tmp_path, Documents(limits), bytes_of)
    del prefills[:]
    with running(engine, limits, tmp_path, documents=documents) as half:
        client = half.ask(BOOKS[1], QUESTIONS[1])
        assert client.wait().cached_tokens == len(client.request.prompt.document) and not prefills
        assert client.tokens == half.expected(BOOKS[1], QUESTIONS[1])
    lock.release()
    few = Documents(Limits(size, 0, size, 2**20))
    latest = max((path for path in tmp_path.iterdir() if len(path.name) == 64), key=lambda path: path.stat().st_mtime)
    take_over(tmp_path, few, bytes_of).release()
    assert [one.key for one in few.at(Place.DISK)] == [latest.name]
    assert len([path for path in tmp_path.iterdir() if len(path.name) == 64]) == 1


def test_a_renamed_document_is_not_taken_for_another(engine: Any, tmp_path: Path) -> None:
    size = engine.pool.document_bytes(first_capacity(200))
    with running(engine, Limits(size, 0, 10 * size, 2**20), tmp_path) as half:
        for book in (BOOKS[0], BOOKS[1], BOOKS[2]):
            half.ask(book, QUESTIONS[0]).wait()
        first, second = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
        other = tmp_path / "x"
        first.rename(other), second.rename(first), other.rename(second)
        for book in BOOKS[:2]:
            client = half.ask(book, QUESTIONS[1])
            client.wait()
            assert client.tokens == half.expected(book, QUESTIONS[1])


def test_documents_in_rotation_that_wait_for_each_other(engine: Any) -> None:
    """Those that wait to come back from host memory are not pushed out of it meanwhile."""
    size = engine.pool.document_bytes(first_capacity(200))
    with running(engine, Limits(size, size, 0, 2**20)) as half:
        for _ in range(4):
            clients = [half.ask(book, question) for question in QUESTIONS[:2] for book in BOOKS]
            for client in clients:
                client.wait()
        assert clients[-1].tokens == half.expected(BOOKS[-1], QUESTIONS[1])


def test_a_document_that_cannot_leave_is_forgotten(
    engine: Any, prefills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, **_: Any) -> None:
        raise RuntimeError("host memory is full")

    monkeypatch.setattr(Context, "to_host", full)
    size = engine.pool.document_bytes(first_capacity(200))
    with running(engine, Limits(size, 10 * size, 0, 2**20)) as half:
        for book in (BOOKS[0], BOOKS[1], BOOKS[0]):
            client = half.ask(book, QUESTIONS[0])
            client.wait()
        assert client.tokens == half.expected(BOOKS[0], QUESTIONS[0])
    assert len(prefills) == 4


def test_who_leaves_the_queue_frees_their_place(engine: Any) -> None:
    long = Options(max_new_tokens=1000, temperature=0.0, ignore_eos=True)
    with running(engine, max_sequences=2, max_waiting=3) as half:
        running_ones = [half.ask(BOOKS[0], question, options=long) for question in QUESTIONS[:2]]
        for client in running_ones:
            assert client.has_token.wait(30)
        waiting = [half.ask(BOOKS[0], f"{question} again") for question in QUESTIONS[:3]]
        for client in waiting:
            client.request.cancel()
        deadline = time.monotonic() + 10
        while half.service.health()["waiting"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert half.service.health() == {"status": "ok", "running": 2, "waiting": 0}
        for client in running_ones:
            client.request.cancel()


def test_who_leaves_while_waiting_for_memory_is_freed(engine: Any) -> None:
    long = Options(max_new_tokens=1500, temperature=0.0, ignore_eos=True)
    with running(engine) as half:
        first = half.ask(BOOKS[0], QUESTIONS[0], options=long)
        assert first.has_token.wait(30)
        batch = half.worker._batch
        batch._max_bytes = sum(batch._reserved.values())
        second = half.ask(BOOKS[0], QUESTIONS[1], options=long)
        deadline = time.monotonic() + 10
        while not batch._waiting and time.monotonic() < deadline:
            time.sleep(0.005)
        assert second.request.handle in batch._waiting
        second.request.cancel()
        deadline = time.monotonic() + 0.5
        while half.service.health()["running"] > 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not batch._waiting and half.service.health() == {"status": "ok", "running": 1, "waiting": 0}
        assert not second.tokens and len(first.tokens) < 1500
        first.request.cancel()


def test_finished_requests_hold_no_document(engine: Any) -> None:
    size = engine.pool.document_bytes(first_capacity(200))
    gc.disable()
    try:
        with running(engine, Limits(size, 0, 0, 2**20)) as half:
            half.ask(BOOKS[0], QUESTIONS[0]).wait()
            (context,) = half.worker._contexts.values()
            left = weakref.ref(context.cache)
            del context
            half.ask(BOOKS[1], QUESTIONS[0]).wait()
            half.ask(BOOKS[1], QUESTIONS[1]).wait()
            assert left() is None
    finally:
        gc.enable()


def test_a_document_waits_until_there_is_room(engine: Any) -> None:
    size = engine.pool.document_bytes(first_capacity(200))
    long = Options(max_new_tokens=200, temperature=0.0, ignore_eos=True)
    with running(engine, Limits(size, 0, 0, 2**20)) as half:
        first = half.ask(BOOKS[0], QUESTIONS[0], options=long)
        assert first.has_token.wait(30)
        second = half.ask(BOOKS[1], QUESTIONS[0])
        third = half.ask(BOOKS[0], QUESTIONS[1])  # must not keep the second from its turn
        for client in (first, second, third):
            client.wait()
        assert second.tokens == half.expected(BOOKS[1], QUESTIONS[0])
        assert third.tokens == half.expected(BOOKS[0], QUESTIONS[1])


def test_the_queue_is_bounded(engine: Any) -> None:
    long = Options(max_new_tokens=300, temperature=0.0, ignore_eos=True)
    with running(engine, max_sequences=1, max_waiting=1) as half:
        clients = [half.ask(BOOKS[0], question, options=long) for question in QUESTIONS[:2]]
        with pytest.raises(ApiError) as raised:
            half.ask(BOOKS[0], QUESTIONS[2])
        assert raised.value.status == 429 and raised.value.retry_after_s
        for client in clients:
            client.request.cancel()
        clients[0].request.cancel()  # twice does nothing
        deadline = time.monotonic() + 30
        while half.service.health()["running"] + half.service.health()["waiting"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert half.ask(BOOKS[0], QUESTIONS[2]).wait()


def test_what_never_fits_is_refused(engine: Any) -> None:
    limits = Limits(document_bytes(engine, 300), 0, 0, 0)
    with running(engine, limits) as half:
        longest = half.service.longest_document
        sizes = [document_bytes(engine, num_tokens) for num_tokens in (longest, longest + 1)]
        assert sizes[0] <= limits.device < sizes[1]
        with pytest.raises(ApiError, match=f"the longest that fits has {longest} tokens") as raised:
            half.ask(BOOKS[0] * 15, QUESTIONS[0])
        assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(ApiError, match="MiB are for documents") as raised:
            half.service.submit(
                half.service.text_prompt(f"{BOOKS[0] * 15}\n{QUESTIONS[0]}"), Options(continues=True), Client()
            )
        assert raised.value.param == "prompt"
        limit = half.service.max_positions
        assert limit is not None
        length = half.service.chat_prompt([Message("user", ("Hello",))]).num_tokens
        said = f"has {length}, so {limit - length} are left for the answer, and {limit} were asked for"
        with pytest.raises(ApiError, match=said) as raised:
            half.ask("Hello", options=Options(max_new_tokens=limit))
        assert raised.value.param == "max_tokens"
        with pytest.raises(ApiError, match="so 0 are left"):
            half.ask("Hello " * limit)
        with pytest.raises(ApiError) as raised:
            half.ask("Hello", options=Options(logit_bias={10**6: 1.0}))
        assert raised.value.param == "logit_bias"


def test_stopping_lets_answers_end(engine: Any) -> None:
    with running(engine) as half:
        client = half.ask(BOOKS[0], QUESTIONS[0], options=Options(max_new_tokens=100, temperature=0.0, ignore_eos=True))
        assert client.has_token.wait(30)
        half.worker.stop()
        with pytest.raises(ApiError) as raised:
            half.ask(BOOKS[0], QUESTIONS[1])
        assert raised.value.status == 503 and half.service.health()["status"] == "stopping"
        assert client.wait().new_tokens == 100


def test_stopping_tells_those_that_take_too_long(engine: Any) -> None:
    with running(engine, stop_s=0.0) as half:
        client = half.ask(BOOKS[0], QUESTIONS[0], options=Options(max_new_tokens=500, temperature=0.0, ignore_eos=True))
        assert client.has_token.wait(30)
        half.worker.stop()
        with pytest.raises(ApiError, match="stopping"):
            client.wait()
        assert len(client.tokens) < 500


def test_stopping_writes_what_is_in_memory_alone(engine: Any, prefills: list[int], tmp_path: Path) -> None:
    size = engine.pool.document_bytes(first_capacity(200))
    with running(engine, Limits(3 * size, 0, 2 * size, 2**20), tmp_path) as half:
        for book in (*BOOKS[:3], BOOKS[0]):
            client = half.ask(book, QUESTIONS[0])
            client.wait()
        keys = {book: half.ask(book, QUESTIONS[1]).request.prompt.key for book in (BOOKS[1], BOOKS[2], BOOKS[0])}
        half.worker.stop()
    latest = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    assert [path.name for path in latest] == [keys[BOOKS[0]], keys[BOOKS[2]]]
    documents = Documents(Limits(3 * size, 0, 2 * size, 2**20))
    lock = take_over(tmp_path, documents, lambda num_tokens: document_bytes(engine, num_tokens))
    del prefills[:]
    with running(engine, documents.limits, tmp_path, documents=documents) as half:
        client = half.ask(BOOKS[0], QUESTIONS[2])
        assert client.wait().cached_tokens == len(client.request.prompt.document) and not prefills
        assert client.tokens == half.expected(BOOKS[0], QUESTIONS[2])
    lock.release()


def test_what_is_not_written_in_time_is_left(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write_all = saved.write_all

    def slow(descriptor: int, data: memoryview, offset: int) -> None:
        time.sleep(0.2)
        written.append(offset)
        write_all(descriptor, data, offset)

    monkeypatch.setattr(saved, "write_all", slow)
    monkeypatch.setattr(saved, "CHUNK_TOKENS", 16)
    with running(engine, Limits(2**30, 0, 2**30, 2**20), tmp_path, stop_s=0.5) as half:
        half.ask(BOOKS[0], QUESTIONS[0]).wait()
    assert written and not list(tmp_path.iterdir())
    num_chunks = 2 * engine.module.config.num_hidden_layers * len(range(0, 100, 16))
    assert len(written) < num_chunks / 2


def test_a_failed_engine_fails_every_request(engine: Any) -> None:
    with running(engine) as half:
        client = half.ask(BOOKS[0], QUESTIONS[0], options=Options(max_new_tokens=500, temperature=0.0, ignore_eos=True))
        assert client.has_token.wait(30)
        half.service.fail(ApiError(503, "gone"))
        with pytest.raises(ApiError, match="gone"):
            client.wait()
        with pytest.raises(ApiError, match="gone"):
            half.ask("Hello")
        client.request.cancel()


def test_memory_that_runs_out_ends_the_latest_answer(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from apb_ds.engine import batch

    run_pack, full = batch.run_pack, threading.Event()

    def failing(engine: Any, members: Any, **options: Any) -> Any:
        if full.is_set() and len(members) > 1:
            raise torch.OutOfMemoryError("none left")
        return run_pack(engine, members, **options)

    monkeypatch.setattr(batch, "run_pack", failing)
    long = Options(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    with running(engine) as half:
        clients: list[Client] = []
        for question in QUESTIONS[:2]:
            clients.append(half.ask(BOOKS[0], question, options=long))
            assert clients[-1].has_token.wait(30)
        full.set()
        with pytest.raises(ApiError, match="out of memory"):
            clients[1].wait()
        assert clients[0].wait().new_tokens == 60


def test_memory_is_the_same_after_many_requests(engine: Any) -> None:
    with running(engine, Limits(2**22, 0, 0, 2**20)) as half:
        sizes = []
        for number in range(60):
            half.ask(BOOKS[number % 4], f"{QUESTIONS[number % 5]} {number}", options=GREEDY).wait()
            sizes.append(engine.pool.num_bytes)
        assert max(sizes[20:]) == max(sizes[40:])
        kept = sum(len(one.conversations) for place in Place for one in half.service.documents.at(place))
        assert 0 < kept <= 60 and len(half.worker._conversations) == kept


def test_open_requests_are_told_that_the_engine_failed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(min_document=MIN_DOCUMENT)
    service, worker = make_half(engine, config, Documents(PLENTY), engine.group)
    assert service is not None
    client, step = Client(), worker._batch.step

    def failing() -> Any:
        if client.has_token.is_set():
            raise RuntimeError("the engine is gone")
        return step()

    monkeypatch.setattr(worker._batch, "step", failing)
    prompt = service.chat_prompt([Message("user", (BOOKS[0],)), Message("user", (QUESTIONS[0],))])
    client.request = service.submit(prompt, GREEDY, client)
    with pytest.raises(RuntimeError, match="gone"):
        worker.run()
    service.fail(failed("The server has failed."))
    assert isinstance(client.events[-1], Failed) and client.events[-1].error.message == "The server has failed."
    assert service.health() == {"status": "failed", "running": 0, "waiting": 0}
