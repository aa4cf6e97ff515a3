"""A real server, alone and on two ranks, and the clients that people use: the official one, curl, and evaluations."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import apb_ds
from apb_ds.serving.prompts import Prompts
from apb_ds.serving.requests import Message
from tests.serving_process import ServerProcess, running_server
from tests.tiny_checkpoint import save_checkpoint

pytestmark = pytest.mark.launcher

KEY = "the-key"
MIN_DOCUMENT = 64
BOOKS = [f"{name} and more of it. " * 6 for name in ("Alpha", "Beta", "Gamma")]
QUESTIONS = [f"What about {thing}?" for thing in ("ants", "bees", "cats", "dogs")]
SETTINGS = (
    *(f"serve.api_key={KEY}", f"serve.min_document={MIN_DOCUMENT}", "serve.body_mib=0.1", "serve.stop_s=2"),
    *("serve.max_sequences=4", "serve.max_waiting=4", "method.hosts=4", "serve.keep_alive_s=1"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def server(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ServerProcess]:
    with running_server(f"model.path={checkpoint}", *SETTINGS, num_ranks=request.param) as found:
        yield found


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0, timeout=60)


class Expected:
    """What `engine.generate` answers, for the same checkpoint and settings."""

    def __init__(self, checkpoint: Path) -> None:
        model, self.tokenizer = apb_ds.load_model(str(checkpoint), device="cpu")
        self.engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=4))
        self.prompts = Prompts(self.tokenizer, MIN_DOCUMENT, "\n\n", 10**6, None, len(self.tokenizer))

    def answer(self, messages: list[dict[str, str]], num_new: int) -> str:
        prompt = self.prompts.chat([Message(one["role"], (one["content"],)) for one in messages])
        document, rest = prompt.document.unsqueeze(0), prompt.rest.unsqueeze(0)
        if not prompt.key:
            document, rest = rest[:, :1], rest[:, 1:]
        context = self.engine.prefill(document)
        tokens = self.engine.generate(query_ids=rest, context=context, max_new_tokens=num_new)
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Expected:
    return Expected(checkpoint)


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    given = {"model": "tiny", "max_tokens": 8, "temperature": 0} | options
    return client.chat.completions.create(messages=messages, **given)


def under_way(server: ServerProcess) -> int:
    health = json.load(urllib.request.urlopen(f"{server.address}/health"))
    return int(health["running"]) + int(health["waiting"])


def becomes_idle(server: ServerProcess, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if under_way(server) == 0:
            return True
        time.sleep(0.02)
    return False


def test_answers_are_those_of_generate(client: openai.OpenAI, expected: Expected) -> None:
    for book in BOOKS[:2]:
        for number, question in enumerate(QUESTIONS[:2]):
            answer = ask(client, user(book, question))
            assert answer.choices[0].message.content == expected.answer(user(book, question), 8)
            assert answer.choices[0].finish_reason in ("stop", "length")
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert (cached > 0) == (number > 0) and cached < answer.usage.prompt_tokens
    short = ask(client, user("Hello"))
    assert short.choices[0].message.content == expected.answer(user("Hello"), 8)
    assert short.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_is_the_whole_answer_in_parts(client: openai.OpenAI) -> None:
    whole = ask(client, user(BOOKS[0], QUESTIONS[0]), max_tokens=12)
    stream = ask(
        client, user(BOOKS[0], QUESTIONS[0]), max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_turns_go_on(client: openai.OpenAI, expected: Expected) -> None:
    letters = {str(ord(letter) - ord("!")): 50 for letter in "abcde"}
    messages = user(f"{BOOKS[2]}\n\n{QUESTIONS[0]}")
    cached = []
    for question in QUESTIONS[1:4]:
        answer = ask(client, messages, logit_bias=letters)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages = [
            *messages,
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "user", "content": question},
        ]
    assert cached[0] == 0 < cached[1] < cached[2]
    assert answer.usage.prompt_tokens - cached[2] < 60
    plain = ask(client, messages)
    assert plain.choices[0].message.content == expected.answer(messages, 8)


def test_sampling_stops_and_log_probabilities(client: openai.OpenAI) -> None:
    messages = user(BOOKS[0], QUESTIONS[0])
    first, again, other = (ask(client, messages, temperature=1, seed=seed, max_tokens=16) for seed in (1, 1, 2))
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
    whole = ask(client, messages, logprobs=True, top_logprobs=2, max_tokens=12)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in entries)
    text = whole.choices[0].message.content
    stop = text[3:5]
    stopped = ask(client, messages, stop=[stop], max_tokens=12).choices[0]
    assert stopped.message.content == text[: text.index(stop)] and stopped.finish_reason == "stop"
    bare = client.completions.create(model="tiny", prompt="Once", max_tokens=5, temperature=0, logprobs=1)
    assert len(bare.choices[0].logprobs.tokens) == bare.usage.completion_tokens


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "apb_ds"
    with pytest.raises(openai.NotFoundError):
        ask(client, user("Hi"), model="another")


def test_refusals(server: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"), user("Hi"))
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: colour"):
        ask(client, user("Hi"), extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, user("Hi"), n=2)
    assert raised.value.param == "n"
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, user("Hi " * 3000))
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as too_large:
        ask(client, user("Hi " * 60_000))
    assert too_large.value.status_code == 413
    for body, status in ((b"{", 400), (b"[]", 400), (b"{}", 400)):
        answer = post(server, body)
        assert (answer.status, json.load(answer)["error"]["type"]) == (status, "invalid_request_error")
    chunked = post(server, iter([b" " * 50_000] * 4))
    assert chunked.status == 413
    assert under_way(server) == 0


def post(server: ServerProcess, body: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=30)
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    return connection.getresponse()


def test_who_leaves_frees_their_place(server: ServerProcess, client: openai.OpenAI) -> None:
    long = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    stream = ask(client, user(BOOKS[0], QUESTIONS[0]), stream=True, **long)
    next(iter(stream))
    assert under_way(server) == 1
    stream.close()
    assert becomes_idle(server, 2.0)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), user(BOOKS[0], QUESTIONS[1]), **long)
    assert becomes_idle(server, 2.0)


def test_a_full_queue(server: ServerProcess, client: openai.OpenAI) -> None:
    long = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}, "stream": True}
    streams = [ask(client, user(BOOKS[0], f"{QUESTIONS[0]} {number}"), **long) for number in range(8)]
    with pytest.raises(openai.RateLimitError) as raised:
        ask(client, user("Hi"))
    assert int(raised.value.response.headers["retry-after"]) > 0
    for stream in streams:
        stream.close()
    assert becomes_idle(server, 10.0)


def test_curl(server: ServerProcess) -> None:
    if shutil.which("curl") is None:
        pytest.skip("missing: curl")
    body = json.dumps({"model": "tiny", "messages": user(BOOKS[0], QUESTIONS[0]), "max_tokens": 4, "stream": True})
    command = ["curl", "-sN", f"{server.address}/v1/chat/completions", "-d", body]
    headers = ["-H", "content-type: application/json", "-H", f"authorization: Bearer {KEY}"]
    said = subprocess.run([*command, *headers], capture_output=True, text=True, timeout=60, check=True).stdout
    events = [line for line in said.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]" and json.loads(events[0][6:])["object"] == "chat.completion.chunk"


def test_metrics(server: ServerProcess, client: openai.OpenAI) -> None:
    ask(client, user(BOOKS[0], QUESTIONS[0]))
    request = urllib.request.Request(f"{server.address}/metrics", headers={"authorization": f"Bearer {KEY}"})
    said = urllib.request.urlopen(request).read().decode()
    assert 'apb_requests_total{path="/v1/chat/completions",status="200"}' in said
    assert "apb_first_token_seconds_count" in said and 'apb_documents{place="device"}' in said


def test_many_clients_at_once(server: ServerProcess, client: openai.OpenAI, expected: Expected) -> None:
    """Chats over three documents, with clients that leave, wrong keys and bad bodies among them."""
    chats = [user(book, question) for book in BOOKS for question in QUESTIONS]
    wanted = [expected.answer(chat, 6) for chat in chats]
    draw = random.Random(0)
    kinds = [draw.choice(["plain", "stream", "leave", "key", "body"]) for _ in range(60)]
    lost: list[str] = []

    async def one(number: int, asker: openai.AsyncOpenAI, places: asyncio.Semaphore) -> str:
        chat, kind = chats[number % len(chats)], kinds[number]
        given: dict[str, Any] = {"model": "tiny", "messages": chat, "max_tokens": 6, "temperature": 0}
        async with places:
            if kind == "key":
                with pytest.raises(openai.AuthenticationError):
                    await asker.with_options(api_key="no").chat.completions.create(**given)
            elif kind == "body":
                with pytest.raises(openai.BadRequestError):
                    await asker.chat.completions.create(**given, extra_body={"top_q": 1})
            elif kind == "leave":
                stream = await asker.chat.completions.create(**{**given, "max_tokens": 500}, stream=True)
                await stream.__anext__()
                await stream.close()
            elif kind == "stream":
                stream = await asker.chat.completions.create(**given, stream=True)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
                if text != wanted[number % len(chats)]:
                    lost.append(text)
            else:
                answer = await asker.chat.completions.create(**given)
                if answer.choices[0].message.content != wanted[number % len(chats)]:
                    lost.append(answer.choices[0].message.content or "")
        return kind

    async def everyone() -> list[str]:
        places = asyncio.Semaphore(3)
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY, max_retries=0, timeout=60) as asker:
            return await asyncio.gather(*(one(number, asker, places) for number in range(60)))

    assert asyncio.run(everyone()) == kinds
    assert lost == []
    assert becomes_idle(server, 10.0)


def test_lm_evaluation_harness(server: ServerProcess, checkpoint: Path, tmp_path: Path) -> None:
    """`local-chat-completions`, the harness's client for such servers, runs a task that generates."""
    pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"book": book, "question": question} for book in BOOKS[:2] for question in QUESTIONS[:2]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "books.yaml").write_text(
        "task: books\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        'doc_to_text: "{{book}}\\n\\n{{question}}"\ndoc_to_target: "a"\n'
        "generation_kwargs:\n  until: []\n  max_gen_toks: 6\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    arguments = (
        f"model=tiny,base_url={server.address}/v1/chat/completions,num_concurrent=2,max_retries=1,"
        f"tokenizer_backend=None,tokenized_requests=False"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        found = simple_evaluate(
            model="local-chat-completions",
            model_args=arguments,
            tasks=["books"],
            task_manager=TaskManager(include_path=str(tmp_path)),
            apply_chat_template=True,
            log_samples=True,
            cache_requests=False,
        )
    samples = found["samples"]["books"]
    assert len(samples) == 4 and all(sample["resps"][0][0] is not None for sample in samples)


def test_a_taken_port_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny")
    (checkpoint / "model.safetensors").write_bytes(b"")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(RuntimeError, match=rf"serve\.port={port}"),
            running_server(f"model.path={checkpoint}", f"serve.port={port}"),
        ):
            pass


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended_by", ["a rank", "Ctrl-C"])
def test_it_ends_when_it_is_told_to(checkpoint: Path, ended_by: str) -> None:
    with running_server(f"model.path={checkpoint}", *SETTINGS, num_ranks=2) as server:
        status = end(server, ended_by)
        if ended_by == "a rank":  # deepspeed itself ends by its own signal
            assert status == 0 and "Traceback" not in server.said, server.said


def test_it_ends_when_its_process_is_told_to(server: ServerProcess) -> None:
    """The last test: it ends the server that the others share."""
    is_alone = server.ranks()[0].pid == server.process.pid
    status = end(server, "process")
    if is_alone:
        assert status == 0 and "Traceback" not in server.said, server.said


def end(server: ServerProcess, ended_by: str) -> int:
    """End a server by a signal while it answers; return its exit status."""
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0, timeout=60)
    short = ask(client, user(BOOKS[0], QUESTIONS[0]), max_tokens=40, extra_body={"ignore_eos": True}, stream=True)
    endless = ask(client, user(BOOKS[0], QUESTIONS[1]), max_tokens=3900, extra_body={"ignore_eos": True}, stream=True)
    next(iter(short)), next(iter(endless))
    if ended_by == "process":  # the launcher's, if there is one
        server.process.send_signal(signal.SIGTERM)
    elif ended_by == "a rank":
        server.ranks()[-1].send_signal(signal.SIGTERM)
    else:
        os.killpg(server.process.pid, signal.SIGINT)
    began = time.monotonic()
    assert [chunk.choices[0].finish_reason for chunk in short if chunk.choices][-1] == "length"
    with pytest.raises(openai.APIError, match="stopping"):
        for _ in endless:
            pass
    status = server.wait()
    assert time.monotonic() - began < 25
    assert server.said.count("Ending; what is under way has") == 1
    assert "tokens are kept:" in server.said and "The server has ended." in server.said
    return status
