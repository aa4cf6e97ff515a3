"""OpenAI's API over HTTP: routes, streams, errors, limits. The engine is behind a `Backend`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apb_ds.serving.config import ServeConfig
from apb_ds.serving.connections import Connection, too_slow
from apb_ds.serving.errors import ApiError, failed
from apb_ds.serving.metrics import Metrics
from apb_ds.serving.protocol import SHOWN_CHARACTERS, ChatRequest, CompletionRequest, read_request
from apb_ds.serving.requests import Backend, Delta, Ended, Event, Failed, Progress, Ticket
from apb_ds.serving.responses import ChatResponse, CompletionResponse, comment, event
from apb_ds.tasks.jsonl import shortened
from apb_ds.tasks.text import read_text

OPEN_PATHS = ("/", "/health")  # need no key
MIB = 2**20
PROGRESS_EVERY_S = 0.5
DONE = "[DONE]"
LEFT = 499  # the status, in metrics and the log, of requests whose client left before their answer's end
BROKEN = "The server had an error while processing your request."

access = logging.getLogger("apb_ds.serving.access")
logger = logging.getLogger(__name__)


def create_app(backend: Backend, config: ServeConfig, metrics: Metrics) -> FastAPI:
    """Return the application.

    Parameters
    ----------
    backend : the engine's side
    config : limits and the key
    """
    app = FastAPI(title="apb_ds", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Access, config=config, metrics=metrics)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)

    @app.post(ChatRequest.path)
    async def chat(request: Request) -> Response:
        asked = read_request(ChatRequest, await _json_of(request, config))
        messages = [one.message for one in asked.messages]
        return await _answer(request, asked, functools.partial(backend.chat_prompt, messages), ChatResponse)

    @app.post(CompletionRequest.path)
    async def completions(request: Request) -> Response:
        asked = read_request(CompletionRequest, await _json_of(request, config))
        return await _answer(request, asked, functools.partial(backend.text_prompt, asked.text), CompletionResponse)

    async def _answer(request: Request, asked: Any, make_prompt: Callable[[], Any], kind: Any) -> Response:
        _check_model(asked.model)
        began = time.perf_counter()
        options = asked.options
        prompt = await asyncio.to_thread(make_prompt)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def listener(one: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, one)

        ticket = await asyncio.to_thread(backend.submit, prompt, options, listener)
        response = kind(backend.tokenizer, backend.model_name, prompt)
        response.has_logprobs = options.top_logprobs is not None
        told = _told(events, ticket, began, prompt.num_tokens, request.scope["apb_ds"])
        if asked.stream:
            body = _stream(told, response, asked.includes_usage, config, request.scope["apb_ds"])
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return _EventStream(ticket, body, media_type="text/event-stream", headers=headers)
        return await _whole(request, told, response)

    async def _told(
        events: asyncio.Queue[Event], ticket: Ticket, began: float, num_prompt: int, facts: Facts
    ) -> AsyncIterator[Event | None]:
        """Yield a request's events until its end, and None where there is none for a while; then free it."""
        deadline = None if config.request_s is None else began + config.request_s
        latest: float | None = None
        num_new = 0
        try:
            while True:
                wait_s = config.keep_alive_s
                if deadline is not None:
                    wait_s = min(wait_s, deadline - time.perf_counter())
                    if wait_s <= 0:
                        why = f"The request took longer than {config.request_s:g} s (serve.request_s)."
                        facts.status = 408
                        yield Failed(ApiError(408, why, kind="timeout", code="request_timeout"))
                        return
                try:
                    async with asyncio.timeout(wait_s):  # wait_for of Python 3.11 may miss that it is cancelled
                        one = await events.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(one, Delta) and one.tokens:
                    now = time.perf_counter()
                    if latest is None:
                        metrics.observe_first_token(now - began)
                    else:
                        metrics.observe_gap(now - latest)
                    latest = now
                    num_new += len(one.tokens)
                if isinstance(one, Ended):
                    facts.tokens = num_prompt, one.cached_tokens, one.new_tokens
                elif isinstance(one, Failed):
                    facts.status = one.error.status
                yield one
                if isinstance(one, (Ended, Failed)):
                    return
        finally:
            ticket.cancel()
            if facts.tokens is None and num_new:
                facts.tokens = num_prompt, ticket.cached_tokens, num_new
            if facts.tokens is not None:
                metrics.count_tokens(*facts.tokens)

    def _check_model(name: str) -> None:
        if name != backend.model_name:
            shown = shortened(name, SHOWN_CHARACTERS)
            raise ApiError(
                404,
                f"The model '{shown}' does not exist; this server has '{backend.model_name}'.",
                param="model",
                code="model_not_found",
            )

    def _card() -> dict[str, Any]:
        card = {"id": backend.model_name, "object": "model", "created": backend.created, "owned_by": "apb_ds"}
        card["min_document"] = config.min_document
        return card if backend.max_positions is None else {**card, "max_model_len": backend.max_positions}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name)
        return _card()

    @app.get("/health")
    async def health() -> Response:
        said = backend.health()
        return JSONResponse(said, 200 if said["status"] == "ok" else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> Response:
        text = resources.files("apb_ds.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY})

    return app


# The page has its script and style inside, and talks to its own server alone.
PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class _Json(JSONResponse):
    """A response that may repeat what a client sent, such as half a surrogate pair."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


@dataclass
class Facts:
    """What the log and the metrics say of a request.

    Attributes
    ----------
    status : that its answer ended with, if that is not the response's: a stream begins with 200 whatever comes
    tokens : of the prompt, of it cached, and new; None where no token came
    """

    status: int | None = None
    tokens: tuple[int, int, int] | None = None


class _EventStream(StreamingResponse):
    """A stream that frees its request, also where the client leaves before it begins."""

    def __init__(self, ticket: Ticket, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


async def _stream(
    told: AsyncIterator[Event | None], response: Any, includes_usage: bool, config: ServeConfig, facts: Facts
) -> AsyncIterator[bytes]:
    """Yield an answer as server-sent events."""
    shown = 0.0
    async with contextlib.aclosing(told) as events:  # type: ignore[type-var]
        try:
            first = response.first()
            if first is not None:
                yield event(first)
            async for one in events:
                if one is None:
                    yield comment("waiting")
                elif isinstance(one, Progress):
                    if time.monotonic() - shown >= PROGRESS_EVERY_S or one.done == one.total:
                        shown = time.monotonic()
                        yield comment(f"prefill {one.done}/{one.total}")
                elif isinstance(one, Delta):
                    chunk = response.add(one)
                    if chunk is not None:
                        yield event(chunk)
                elif isinstance(one, Failed):
                    yield event(one.error.body)
                else:
                    yield event(response.last(one))
                    if includes_usage:
                        yield event(response.usage_chunk(one))
        except Exception as error:
            logger.error("a stream failed", exc_info=error)
            facts.status = 500
            yield event(failed(BROKEN).body)
        yield event(DONE)


async def _whole(request: Request, told: AsyncIterator[Event | None], response: Any) -> Response:
    """Return an answer once it is complete; end it if the client leaves."""

    async def collect() -> Response:
        async with contextlib.aclosing(told) as events:  # type: ignore[type-var]
            async for one in events:
                if isinstance(one, Delta):
                    response.add(one)
                elif isinstance(one, Failed):
                    raise one.error
                elif isinstance(one, Ended):
                    return _Json(response.complete(one))
        raise failed("The answer ended without an end.")

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(left())
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return collecting.result()
        return Response(status_code=LEFT)  # nobody reads it
    finally:
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)


async def _json_of(request: Request, config: ServeConfig) -> Any:
    """Return a request's body, read only as far as it may be long, and as long as it may take."""
    limit = int(config.body_mib * MIB)
    too_large = ApiError(
        413, f"The body is larger than {config.body_mib:g} MiB (serve.body_mib).", code="request_too_large"
    )
    given = request.headers.get("content-length", "")
    if given.isdecimal() and int(given) > limit:
        raise too_large
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", ""):
        raise ApiError(400, f"The body must be application/json, not {kind}.", code="unsupported_content_type")
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise too_slow(config) from None
    try:
        return await asyncio.to_thread(json.loads, bytes(body))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}.") from error


class _Access:
    """Gives each request an id, checks its key, and logs it without its content."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        key = config.api_key
        self._key = None if key is None else read_text("serve.api_key", key).strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        number = secrets.token_hex(8)
        scope["apb_ds"] = facts = Facts()
        status = LEFT
        is_complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", number.encode()))
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            if scope["path"] not in OPEN_PATHS and not self._has_key(scope):
                error = ApiError(401, "Incorrect or missing API key.", code="invalid_api_key")
                await _response_of(error)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass  # within its body: nobody reads an answer
        except asyncio.CancelledError:
            facts.status = facts.status or 503  # the server has stopped
            raise
        except Exception as error:
            logger.error("request %s failed", number, exc_info=error)
            facts.status = 500
            if status != LEFT:
                raise  # within a response: the connection is closed
            await _response_of(failed(BROKEN))(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            status = facts.status or (status if is_complete else LEFT)
            self._metrics.count_request(getattr(route, "path", "other"), status)
            tokens = "" if facts.tokens is None else " prompt={} cached={} new={}".format(*facts.tokens)
            seconds = time.perf_counter() - began
            path = quote(scope["path"])
            access.info('%s "%s %s" %d %.3fs%s', number, scope["method"], path, status, seconds, tokens)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


def _response_of(error: ApiError) -> Response:
    return _Json(error.body, error.status, error.headers)


async def _on_api_error(request: Request, error: Any) -> Response:
    return _response_of(error)


async def _on_http_error(request: Request, error: Any) -> Response:
    said = f"{request.method} {request.url.path}: {error.detail}"
    response = _response_of(ApiError(error.status_code, said, code="unknown_url" if error.status_code == 404 else None))
    response.headers.update(error.headers or {})
    return response


class HttpServer:
    """Runs an application in a thread of its own.

    Parameters
    ----------
    app : from `create_app`
    config : limits of its connections
    bound : from `bind`

    Raises
    ------
    ValueError
        If another process has begun to listen at the port since it was bound.
    """

    def __init__(self, app: FastAPI, config: ServeConfig, bound: socket.socket) -> None:
        self._socket = bound
        try:
            bound.listen()  # or another process could take the port before the server has started
        except OSError as error:
            raise _not_listening(config, error) from error
        protocol: Any = functools.partial(Connection, serve=config)
        self._server = uvicorn.Server(
            uvicorn.Config(app, http=protocol, log_config=None, access_log=False, lifespan="off")
        )
        self._thread = threading.Thread(target=self._run, daemon=True, name="apb_ds http")
        host, port = self._socket.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self) -> None:
        """Serve; returns once it listens."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    def stop(self, timeout_s: float) -> None:
        """Close; open responses get some seconds to end."""
        self._server.should_exit = True
        self._thread.join(timeout_s)
        self._server.force_exit = True
        self._thread.join(1.0)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


def bind(config: ServeConfig) -> socket.socket:
    """Return a socket at the host and port, not listening yet; ValueError, naming the settings, if that fails."""
    made: socket.socket | None = None
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((config.host, config.port))
    except OSError as error:
        if made is not None:
            made.close()
        raise _not_listening(config, error) from error
    return made


def _not_listening(config: ServeConfig, error: OSError) -> ValueError:
    said = f"cannot listen at serve.host={config.host} serve.port={config.port} ({error.strerror or error})"
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"{said}: set serve.port to another one, or to 0 for any free one.")
    return ValueError(f"{said}.")
