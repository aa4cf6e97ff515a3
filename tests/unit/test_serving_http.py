"""OpenAI's API over HTTP, before a backend that does what each test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from starlette.testclient import TestClient

from apb_ds.serving.app import HttpServer, bind, create_app
from apb_ds.serving.config import ServeConfig
from apb_ds.serving.errors import ApiError, busy, failed, unavailable
from apb_ds.serving.metrics import Metrics
from apb_ds.serving.requests import Delta, Ended, Event, Failed, Listener, Message, Options, Progress, Prompt
from tests.tiny_checkpoint import byte_tokenizer

SECRET = "the user's secret text"
MODEL = "tiny/model"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}]}
COMPLETION = {"model": MODEL, "prompt": SECRET}
ENDED = Ended("stop", 2, cached_tokens=3)
ANSWER = (Delta("Hel", (72,)), Delta("", (76,)), Delta("lo", ()), ENDED)
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WAIT_S = 10.0


class FakeTicket:
    cached_tokens = 1

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeBackend:
    """Tells each request what it was given to tell.

    Attributes
    ----------
    events : of each answer, told at once; exceptions and functions in it are raised and called
    asked : prompts and options of the requests that were taken
    """

    model_name = MODEL
    created = 1_700_000_000
    max_positions: int | None = 4096

    def __init__(self, *events: Any) -> None:
        self.tokenizer = byte_tokenizer()
        self.events = events or ANSWER
        self.asked: list[tuple[Prompt, Options]] = []
        self.tickets: list[FakeTicket] = []
        self.listeners: list[Listener] = []
        self.said: Any = None
        self.prompt_error: Exception | None = None
        self.submit_error: Exception | None = None
        self.before_submit: Callable[[], Any] = lambda: None
        self.status = "ok"

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        return self._prompt(messages)

    def text_prompt(self, text: str | Sequence[int]) -> Prompt:
        return self._prompt(text)

    def _prompt(self, said: Any) -> Prompt:
        self.said = said
        if self.prompt_error is not None:
            raise self.prompt_error
        return Prompt(torch.arange(4), torch.arange(3), "key")

    def submit(self, prompt: Prompt, options: Options, listener: Listener) -> FakeTicket:
        self.before_submit()
        if self.submit_error is not None:
            raise self.submit_error
        self.asked.append((prompt, options))
        ticket = FakeTicket()
        self.listeners.append(listener)
        self.tickets.append(ticket)
        for event in self.events:
            listener(event)
        return ticket

    def health(self) -> dict[str, Any]:
        return {"status": self.status, "running": 0, "waiting": 0}


def client_of(backend: FakeBackend, metrics: Metrics | None = None, **settings: Any) -> TestClient:
    app = create_app(backend, ServeConfig(**settings), metrics or Metrics())
    return TestClient(app, raise_server_exceptions=True)


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    return dict(body["error"])


def events_in(text: str) -> tuple[list[Any], list[str]]:
    """Return a stream's events and comments."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found: list[Any] = []
    comments = []
    for block in blocks:
        if block.startswith(": "):
            comments.append(block[2:])
        else:
            assert block.startswith("data: ") and "\n" not in block
            value = block[len("data: ") :]
            found.append(value if value == "[DONE]" else json.loads(value))
    return found, comments


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_chat_whole() -> None:
    backend = FakeBackend()
    response = client_of(backend).post(CHATS, json={**CHAT, "temperature": 0.5, "max_tokens": 9})
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert abs(body.pop("created") - time.time()) < 60
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
    assert backend.said == [Message("user", (SECRET,))]
    assert backend.asked[0][1] == Options(temperature=0.5, max_new_tokens=9)
    assert backend.tickets[0].cancelled.is_set()  # frees what it holds


def test_completion_whole() -> None:
    backend = FakeBackend(*ANSWER[:-1], Ended("length", 2))
    body = client_of(backend).post(COMPLETIONS, json={**COMPLETION, "prompt": [[1, 2]]}).json()
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["total_tokens"] == 9
    assert backend.said == [1, 2]
    assert backend.asked[0][1].continues


@pytest.mark.parametrize("with_usage", [False, True])
def test_chat_stream(with_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    response = client_of(FakeBackend()).post(CHATS, json={**CHAT, "stream": True, **options})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    found, comments = events_in(response.text)
    assert comments == []
    assert found.pop() == "[DONE]"
    usage = found.pop() if with_usage else None
    deltas = [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"] for chunk in found] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": "stop" if delta == {} else None}]
        for delta in deltas
    ]
    everything = found if usage is None else [*found, usage]
    assert {chunk["object"] for chunk in everything} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in everything} == {MODEL}
    assert len({chunk["id"] for chunk in everything}) == 1 and len({chunk["created"] for chunk in everything}) == 1
    if usage is not None:
        assert usage["choices"] == []
        assert (usage["usage"]["completion_tokens"], usage["usage"]["prompt_tokens"]) == (2, 7)


def test_completion_stream() -> None:
    response = client_of(FakeBackend()).post(COMPLETIONS, json={**COMPLETION, "stream": True})
    found, _ = events_in(response.text)
    assert found.pop() == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in found] == ["Hel", "lo", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None, None, "stop"]
    assert {chunk["object"] for chunk in found} == {"text_completion"}


def test_text_of_any_kind_is_passed_on() -> None:
    text = 'a\n\n"é"\u2028😀 data: [DONE]\ud83d'
    backend = FakeBackend(Delta(text, (1,)), ENDED)
    expected = text.replace("\ud83d", "?")
    assert client_of(backend).post(CHATS, json=CHAT).json()["choices"][0]["message"]["content"] == expected
    found, _ = events_in(client_of(backend).post(CHATS, json={**CHAT, "stream": True}).text)
    assert found[1]["choices"][0]["delta"]["content"] == expected


def test_models() -> None:
    client = client_of(FakeBackend())
    card = {"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "apb_ds"}
    card |= {"min_document": 2048, "max_model_len": 4096}
    assert client.get("/v1/models").json() == {"object": "list", "data": [card]}
    assert client.get(f"/v1/models/{MODEL}").json() == card
    assert client.get("/v1/models/tiny%2Fmodel").json() == card
    error = error_of(client.get("/v1/models/tiny"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_models_without_a_limit() -> None:
    backend = FakeBackend()
    backend.max_positions = None
    assert "max_model_len" not in client_of(backend).get(f"/v1/models/{MODEL}").json()


@pytest.mark.parametrize(("status", "code"), [("ok", 200), ("stopping", 503), ("failed", 503)])
def test_health(status: str, code: int) -> None:
    backend = FakeBackend()
    backend.status = status
    response = client_of(backend, api_key="key").get("/health")
    assert response.status_code == code and response.json()["status"] == status


def test_page() -> None:
    response = client_of(FakeBackend(), api_key="key").get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_errors_of_prompts_and_of_the_queue() -> None:
    backend = FakeBackend()
    client = client_of(backend)
    backend.submit_error = busy("too many", 5)
    response = client.post(CHATS, json=CHAT)
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "5"
    backend.submit_error = unavailable("stopping")
    assert error_of(client.post(CHATS, json={**CHAT, "stream": True}), 503)["message"] == "stopping"
    backend.prompt_error = ApiError(400, "too long", param="messages", code="context_length_exceeded")
    for stream in (False, True):
        error = error_of(client.post(CHATS, json={**CHAT, "stream": stream}), 400)
        assert error == {
            "message": "too long",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
    assert backend.asked == []


@pytest.mark.parametrize("place", ["prompt_error", "submit_error"])
@pytest.mark.parametrize("stream", [False, True])
def test_bugs_are_errors_without_their_text(place: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    backend, metrics = FakeBackend(), Metrics()
    setattr(backend, place, KeyError("internal detail"))
    response = client_of(backend, metrics).post(CHATS, json={**CHAT, "stream": stream})
    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert "internal" not in response.text and "KeyError" not in response.text
    assert "internal detail" in caplog.text
    assert f'apb_requests_total{{path="{CHATS}",status="500"}} 1.0' in metrics.text().decode()


def test_routes_that_do_not_exist() -> None:
    client = client_of(FakeBackend())
    error = error_of(client.post("/v1/embeddings", json={}), 404)
    assert error["code"] == "unknown_url" and "/v1/embeddings" in error["message"]
    response = client.get(CHATS)
    assert error_of(response, 405)["type"] == "invalid_request_error"
    assert response.headers["allow"] == "POST"
    assert error_of(client.get("/docs"), 404)
    assert error_of(client.get("/openapi.json"), 404)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "parse"),
        (b"{", "parse"),
        (b"\xff\xfe", "parse"),
        (b"[" * 100_000, "parse"),
        (b"1" * 5000, "parse"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"model": "tiny/model"}', "'messages'"),
        (b'{"\\ud800": 1}', "Unrecognized"),
    ],
)
def test_bad_bodies(body: bytes, said: str) -> None:
    response = client_of(FakeBackend()).post(CHATS, content=body, headers={"content-type": "application/json"})
    assert said in error_of(response, 400)["message"]


def test_wrong_model() -> None:
    client = client_of(FakeBackend())
    for name in ("gpt-4o", "", "\ud800", "x" * 100_000):
        body = json.dumps({**CHAT, "model": name})
        error = error_of(client.post(CHATS, content=body, headers={"content-type": "application/json"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert MODEL in error["message"] and len(error["message"]) < 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [("application/json; charset=utf-8", 200), ("text/plain", 400), ("multipart/form-data; boundary=x", 400)],
)
def test_content_type(kind: str, status: int) -> None:
    response = client_of(FakeBackend()).post(CHATS, content=json.dumps(CHAT), headers={"content-type": kind})
    assert response.status_code == status
    if status == 400:
        assert kind.partition(";")[0] in error_of(response, 400)["message"]


def test_bodies_that_are_too_large() -> None:
    backend = FakeBackend()
    client = client_of(backend, body_mib=0.001)
    for content in (b"x" * 2000, iter([b"x" * 600, b"x" * 600])):  # with a length, and chunked
        response = client.post(CHATS, content=content, headers={"content-type": "application/json"})
        error = error_of(response, 413)
        assert error["code"] == "request_too_large" and "serve.body_mib" in error["message"]
    assert client.post(CHATS, json=CHAT).status_code == 200


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", "Basic right", "right", "Bearer right2", "Bearer é"])
def test_wrong_keys(given: str | None) -> None:
    backend = FakeBackend()
    client = client_of(backend, api_key="right")
    headers = {} if given is None else {"authorization": given.encode()}
    for response in (client.post(CHATS, json=CHAT, headers=headers), client.get("/v1/models", headers=headers)):
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(client.get("/metrics", headers=headers), 401)
    assert error_of(client.get("/nothing", headers=headers), 401)
    assert backend.asked == []


def test_right_keys(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("right\n")
    for api_key, key in (("right", "right"), (f"@{tmp_path / 'key'}", "right"), ("@@at", "@at"), ("clé", "clé")):
        client = client_of(FakeBackend(), api_key=api_key)
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} {key}".encode()}
            assert client.post(CHATS, json=CHAT, headers=headers).status_code == 200


def test_key_files_that_are_empty(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(ValueError, match=r"serve\.api_key"):
        client_of(FakeBackend(), api_key=f"@{tmp_path / 'key'}").get("/health")


# --- failures, and time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), ANSWER[:1]])
def test_failures_of_whole_answers_have_a_status(before: tuple[Event, ...]) -> None:
    backend = FakeBackend(*before, Failed(failed("memory ran out")))
    assert error_of(client_of(backend).post(CHATS, json=CHAT), 500)["message"] == "memory ran out"
    assert backend.tickets[0].cancelled.is_set()


@pytest.mark.parametrize("before", [(), ANSWER[:1]])
def test_failures_of_streams_are_error_objects(before: tuple[Event, ...]) -> None:
    backend = FakeBackend(*before, Failed(unavailable("stopping")))
    response = client_of(backend).post(CHATS, json={**CHAT, "stream": True})
    found, _ = events_in(response.text)
    assert response.status_code == 200
    assert len(found) == 3 + len(before)
    assert found[-1] == "[DONE]"
    assert found[-2]["error"]["message"] == "stopping" and found[-2]["error"]["code"] == "unavailable"


def test_bug_within_a_stream_is_an_error_object() -> None:
    bad = Delta("a", (1, 2), ())
    object.__setattr__(bad, "text", 5)
    backend = FakeBackend(ANSWER[0], bad)
    response = client_of(backend).post(CHATS, json={**CHAT, "stream": True})
    found, _ = events_in(response.text)
    assert found[-2]["error"]["type"] == "server_error" and found[-1] == "[DONE]"
    assert backend.tickets[0].cancelled.is_set()


@pytest.mark.parametrize("events", [(Progress(0, 4),), ANSWER[:1]])
def test_requests_that_take_too_long(events: tuple[Event, ...]) -> None:
    backend = FakeBackend(*events)
    client = client_of(backend, request_s=0.2)
    error = error_of(client.post(CHATS, json=CHAT), 408)
    assert error["code"] == "request_timeout" and "serve.request_s" in error["message"]
    found, _ = events_in(client.post(CHATS, json={**CHAT, "stream": True}).text)
    assert found[-2]["error"]["code"] == "request_timeout" and found[-1] == "[DONE]"
    assert all(ticket.cancelled.is_set() for ticket in backend.tickets)


def test_streams_are_kept_alive() -> None:
    backend = FakeBackend(Progress(1, 4))
    client = client_of(backend, keep_alive_s=0.05, request_s=0.5)
    _, comments = events_in(client.post(CHATS, json={**CHAT, "stream": True}).text)
    assert comments[0] == "prefill 1/4"
    assert comments.count("waiting") >= 3


def test_progress_is_said_now_and_then() -> None:
    backend = FakeBackend(*(Progress(done, 100) for done in range(101)), *ANSWER)
    found, comments = events_in(client_of(backend).post(CHATS, json={**CHAT, "stream": True}).text)
    assert comments[0] == "prefill 0/100" and comments[-1] == "prefill 100/100"
    assert len(comments) < 20
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert client_of(backend).post(CHATS, json=CHAT).json()["choices"][0]["message"]["content"] == "Hello"


# --- the log, and metrics --------------------------------------------------------------------------------------------


def test_access_log_has_no_content(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = client_of(FakeBackend(), api_key="right")
    headers = {"authorization": "Bearer right"}
    response = client.post(CHATS, json=CHAT, headers=headers)
    client.post(COMPLETIONS, json={**COMPLETION, "stream": True}, headers=headers)
    client.post(CHATS, json={**CHAT, "zzz": 1}, headers=headers)
    client.get("/a%0Ab?q=secret", headers=headers)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("apb_ds")]
    assert len(ours) == 4
    first = f'{response.headers["x-request-id"]} "POST {CHATS}" 200 '
    assert ours[0].startswith(first) and ours[0].endswith(" prompt=7 cached=3 new=2")
    assert f'"POST {COMPLETIONS}" 200 ' in ours[1] and ours[1].endswith("new=2")
    assert '" 400 ' in ours[2] and '"GET /a%0Ab" 404 ' in ours[3]
    for text in ("secret", "Hello", "right", "\n"):
        assert not any(text in line for line in ours)


def outcomes(metrics: Metrics) -> dict[str, float]:
    """Return how many chats ended with each status."""
    samples = [one for family in metrics.registry.collect() for one in family.samples]
    return {
        one.labels["status"]: one.value
        for one in samples
        if one.name == "apb_requests_total" and one.labels["path"] == CHATS
    }


BAD = Delta("a", (1,))
object.__setattr__(BAD, "text", 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("last", "status", "num_new"),
    [((), 408, 2), ((Failed(unavailable("stopping")),), 503, 2), ((Failed(failed("no")),), 500, 2), ((BAD,), 500, 3)],
)
def test_answers_that_fail_are_counted_as_what_they_were(
    stream: bool, last: tuple[Event, ...], status: int, num_new: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics()
    client = client_of(FakeBackend(*ANSWER[:3], *last), metrics, request_s=0.2)
    client.post(CHATS, json={**CHAT, "stream": stream})
    assert outcomes(metrics) == {str(status): 1.0}
    assert f'apb_tokens_total{{kind="new"}} {num_new}.0' in metrics.text().decode()
    line = next(one.getMessage() for one in caplog.records if one.name == "apb_ds.serving.access")
    assert f'" {status} ' in line and line.endswith(f" prompt=7 cached=1 new={num_new}")


def test_request_ids_differ() -> None:
    client = client_of(FakeBackend())
    ids = {client.get("/health").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


def test_metrics() -> None:
    metrics = Metrics()
    client = client_of(FakeBackend(Delta("a", (1,)), Delta("b", (2,)), Delta("c", (3,)), ENDED), metrics)
    client.post(CHATS, json=CHAT)
    client.post(CHATS, json={**CHAT, "stream": True})
    client.post(CHATS, json={})
    client.get(f"/v1/models/{MODEL}")
    client.get("/nothing/else")
    metrics.set_requests(2, 1)
    metrics.set_documents({"device": (3, 1024)})
    metrics.observe_load("prefill", 0.4)
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = set(response.text.splitlines())
    assert lines >= {
        f'apb_requests_total{{path="{CHATS}",status="200"}} 2.0',
        f'apb_requests_total{{path="{CHATS}",status="400"}} 1.0',
        'apb_requests_total{path="/v1/models/{name:path}",status="200"} 1.0',
        'apb_requests_total{path="other",status="404"} 1.0',
        'apb_tokens_total{kind="prompt"} 14.0',
        'apb_tokens_total{kind="cached"} 6.0',
        'apb_tokens_total{kind="new"} 4.0',
        "apb_first_token_seconds_count 2.0",
        "apb_token_gap_seconds_count 4.0",
        'apb_load_seconds_count{source="prefill"} 1.0',
        'apb_requests_under_way{state="running"} 2.0',
        'apb_requests_under_way{state="waiting"} 1.0',
        'apb_documents{place="device"} 3.0',
        'apb_document_bytes{place="device"} 1024.0',
    }


# --- sockets ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(backend: FakeBackend, metrics: Metrics | None = None, **settings: Any) -> Iterator[HttpServer]:
    config = ServeConfig(port=0, **settings)
    server = HttpServer(create_app(backend, config, metrics or Metrics()), config, bind(config))
    server.start()
    try:
        yield server
    finally:
        server.stop(1.0)


def connected(server: HttpServer, path: str = CHATS, body: bytes | None = None, **fields: Any) -> socket.socket:
    """Return a connection that has sent a request."""
    host, _, port = server.address.removeprefix("http://").rpartition(":")
    body = json.dumps({**CHAT, **fields}).encode() if body is None else body
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    made = socket.create_connection((host, int(port)), timeout=WAIT_S)
    made.sendall(head.encode() + body)
    return made


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """Return what comes, up to a mark or the end."""
    found = b""
    while mark not in found:
        more = connection.recv(65536)
        if not more:
            break
        found += more
    return found


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("events", [(Progress(0, 4),), ANSWER[:1]])
def test_clients_that_leave_cancel_their_requests(stream: bool, events: tuple[Event, ...]) -> None:
    backend, metrics = FakeBackend(*events), Metrics()
    with served(backend, metrics) as server:
        connection = connected(server, stream=stream)
        if stream:
            read_until(connection, b"Hel" if events == ANSWER[:1] else b"prefill")
        wait_for(lambda: backend.tickets)
        time.sleep(0.05)
        assert not backend.tickets[0].cancelled.is_set()
        connection.close()
        assert backend.tickets[0].cancelled.wait(0.4)
        wait_for(lambda: outcomes(metrics) == {"499": 1.0})
        assert (
            f'apb_tokens_total{{kind="new"}} {sum(isinstance(one, Delta) for one in events)}.0'
            in metrics.text().decode()
        )
        backend.events = ANSWER
        assert b"Hello" in read_until(connected(server), b"usage")  # others are served


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_before_their_answer_begins(stream: bool) -> None:
    backend = FakeBackend(Progress(0, 4))
    has_left = threading.Event()
    is_here = threading.Event()

    def before_submit() -> None:
        is_here.set()
        assert has_left.wait(WAIT_S)
        time.sleep(0.1)  # the server has noticed

    backend.before_submit = before_submit
    with served(backend) as server:
        connection = connected(server, stream=stream)
        assert is_here.wait(WAIT_S)
        connection.close()
        has_left.set()
        wait_for(lambda: backend.tickets)
        assert backend.tickets[0].cancelled.wait(0.5)


@pytest.mark.parametrize("blocks_at", ["http.response.start", "http.response.body"])
def test_clients_that_leave_without_reading(blocks_at: str) -> None:
    """The answer's events are never looked at, as nothing can be sent."""
    backend, metrics = FakeBackend(ANSWER[0]), Metrics()
    app = create_app(backend, ServeConfig(), metrics)
    body = json.dumps({**CHAT, "stream": True}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": CHATS,
        "raw_path": CHATS.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("x", 1),
        "server": ("x", 1),
    }

    async def ask() -> None:
        is_blocked = asyncio.Event()
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            for request in requests:
                return request
            await is_blocked.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == blocks_at:
                is_blocked.set()
                await asyncio.sleep(WAIT_S)

        await asyncio.wait_for(app(scope, receive, send), WAIT_S / 2)

    asyncio.run(ask())
    assert backend.tickets[0].cancelled.is_set()
    assert outcomes(metrics) == {"499": 1.0}


def test_body_that_is_too_large_for_real() -> None:
    with served(FakeBackend(), body_mib=0.01) as server:
        connection = connected(server, body=b"x" * 20_000)
        assert b" 413 " in read_until(connection, b"request_too_large")


def open_to(server: HttpServer, sent: bytes = b"") -> socket.socket:
    host, _, port = server.address.removeprefix("http://").rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=WAIT_S)
    made.sendall(sent)
    return made


def said_by(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Return the status and the error of a response that ends its connection."""
    head, _, body = read_until(connection, b"never sent").partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def trickle(connection: socket.socket, data: bytes) -> float:
    """Send a byte at a time; return after how many seconds the server closed the connection."""
    began = time.monotonic()
    connection.settimeout(0.02)
    for place in range(len(data)):
        with contextlib.suppress(TimeoutError):
            try:
                connection.send(data[place : place + 1])
                if not connection.recv(65536):
                    break
            except ConnectionError:
                break
    else:
        raise AssertionError("all was read")
    return time.monotonic() - began


def test_connections_are_limited() -> None:
    with served(FakeBackend(), max_connections=2) as server:
        held = [open_to(server), open_to(server, b"GET /health HTTP/1.1\r\n")]
        time.sleep(0.05)
        for body in (b"", b"x" * 2**20):  # what is sent meanwhile is no reason to reset the connection
            refused = connected(server, body=body)
            status, error = said_by(refused)
            assert status == 503 and error["code"] == "unavailable" and "serve.max_connections" in error["message"]
        held.pop().close()
        time.sleep(0.05)
        assert b"Hello" in read_until(connected(server), b"usage")


def test_bodies_that_are_slow() -> None:
    backend, metrics = FakeBackend(), Metrics()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n"
    with served(backend, metrics, body_s=0.3) as server:
        connection = open_to(server, head + b"{")
        for _ in range(3):
            time.sleep(0.05)
            connection.sendall(b" ")
        response = read_until(connection, b"}}")
        assert b" 408 " in response and b"serve.body_s" in response and b"request_timeout" in response
        assert 0.2 < trickle(connection, b" " * 400) < 1.0  # the rest of it has a limit, too
        assert f'path="{CHATS}",status="408"' in metrics.text().decode()
    assert backend.asked == []


def test_bodies_that_nobody_reads_have_a_limit() -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n"
    with served(FakeBackend(), body_s=0.3, api_key="key") as server:
        connection = open_to(server, head)
        assert b" 401 " in read_until(connection, b"}}")
        assert trickle(connection, b" " * 400) < 1.0


def test_heads_that_are_slow() -> None:
    with served(FakeBackend(), body_s=0.3) as server:
        silent, slow = open_to(server), open_to(server, b"GET /health HT")
        response = read_until(slow, b"}}")
        assert b" 408 " in response and b"serve.body_s" in response and b"x-should-retry: false" in response
        assert silent.recv(1) == b""
        assert trickle(open_to(server), b"GET /health HTTP/1.1\r\n" + b"a" * 400) < 1.0


def test_answers_may_take_longer_than_requests() -> None:
    backend = FakeBackend(ANSWER[0])
    with served(backend, body_s=0.2) as server:
        connection = connected(server, stream=True)
        wait_for(lambda: backend.listeners)
        time.sleep(0.5)
        backend.listeners[0](ENDED)
        assert b"[DONE]" in read_until(connection, b"[DONE]")


def test_what_is_not_http_gets_an_error_object() -> None:
    with served(FakeBackend()) as server:
        status, error = said_by(open_to(server, b"\x16\x03\x01 hello\r\n\r\n"))
        assert status == 400 and error["type"] == "invalid_request_error"


def test_openais_client_does_not_repeat_what_took_too_long() -> None:
    backend = FakeBackend(Progress(0, 4))
    with served(backend, request_s=0.2) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="key")
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    assert raised.value.status_code == 408 and len(backend.asked) == 1


def test_tokens_come_as_they_are_told() -> None:
    backend = FakeBackend(Delta("one", (1,)))
    with served(backend) as server:
        connection = connected(server, stream=True)
        assert b"one" in read_until(connection, b"one")
        backend.listeners[0](Delta("two", (2,)))
        assert b"two" in read_until(connection, b"two")
        backend.listeners[0](ENDED)
        assert b"[DONE]" in read_until(connection, b"[DONE]")


def test_stopping_ends_open_streams_in_time() -> None:
    backend, metrics = FakeBackend(ANSWER[0]), Metrics()
    with served(backend, metrics) as server:
        connections = [connected(server, stream=True), connected(server)]
        read_until(connections[0], b"Hel")
        wait_for(lambda: len(backend.tickets) == 2)
        began = time.monotonic()
        server.stop(0.3)
        assert time.monotonic() - began < 2.5
        for connection in connections:
            read_until(connection, b"never sent")  # ends
        for ticket in backend.tickets:
            assert ticket.cancelled.wait(1.0)
        wait_for(lambda: outcomes(metrics) == {"503": 2.0})
        assert 'apb_tokens_total{kind="new"} 2.0' in metrics.text().decode()
        with pytest.raises(OSError):
            connected(server)


def test_stopping_waits_for_answers_that_end() -> None:
    backend = FakeBackend(ANSWER[0])
    with served(backend) as server:
        connection = connected(server, stream=True)
        read_until(connection, b"Hel")
        stopping = threading.Thread(target=server.stop, args=(WAIT_S,))
        stopping.start()
        time.sleep(0.1)
        backend.listeners[0](Failed(unavailable("stopping")))
        assert b"stopping" in read_until(connection, b"[DONE]")
        stopping.join(3.0)
        assert not stopping.is_alive()
        backend.listeners[0](ENDED)  # nobody listens any more


def test_taken_port_is_named() -> None:
    app = create_app(FakeBackend(), ServeConfig(), Metrics())
    early = bind(ServeConfig(port=0))
    taken = ServeConfig(port=early.getsockname()[1])
    late = bind(taken)  # nobody listens yet
    first = HttpServer(app, taken, early)  # not started yet
    for fails in (lambda: bind(taken), lambda: HttpServer(app, taken, late)):
        with pytest.raises(ValueError, match=rf"serve\.port={taken.port}.*in use.*0 for any free one"):
            fails()
    late.close()
    first.start()
    first.stop(1.0)
    again = HttpServer(app, taken, bind(taken))
    again.start()
    again.stop(1.0)


def test_unknown_host_is_named() -> None:
    with pytest.raises(ValueError, match=r"serve\.host=no\.such\.host\.invalid") as raised:
        bind(ServeConfig(host="no.such.host.invalid"))
    assert "free one" not in str(raised.value)
