"""HTTP connections: how many may be open, and how long a request may take to arrive."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from apb_ds.serving.config import ServeConfig
from apb_ds.serving.errors import ApiError, unavailable

# A refused connection stays open so long for its client to read why: one that is closed at once would be reset.
REFUSED_S = 1.0


class Connection(H11Protocol):
    """A client's connection.

    The application limits how long a body takes that it waits for. Here the time for a request's head is limited, and
    for a body that is still sent when the answer to it is complete.

    Parameters
    ----------
    serve : limits
    **of_uvicorn : what uvicorn gives a protocol
    """

    def __init__(self, *, serve: ServeConfig, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._serve = serve
        self._is_refused = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) <= self._serve.max_connections:
            self._watch()
            return
        self._is_refused = True
        self.connections.discard(self)
        self._write(unavailable(f"{self._serve.max_connections} connections are open (serve.max_connections)."))
        transport.write_eof()
        self._timer = self.loop.call_later(REFUSED_S, transport.close)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; a connection that is answered so ends."""
        self._write(ApiError(400, msg))
        self.transport.close()

    def _watch(self) -> None:
        """Have the timer run while a request is awaited, or the rest of one that has been answered."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._serve.body_s, self._took_too_long)

    def _took_too_long(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._write(too_slow(self._serve))
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write(self, error: ApiError) -> None:
        """Answer with an error, of no request."""
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
        lines = [f"{name}: {value}" for name, value in (headers | error.headers).items()]
        head = "\r\n".join([f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *lines, "", ""])
        self.transport.write(head.encode() + body)


def too_slow(config: ServeConfig) -> ApiError:
    """Return the refusal of a request that takes too long to arrive."""
    why = f"The request took longer than {config.body_s:g} s to arrive (serve.body_s)."
    return ApiError(408, why, kind="timeout", code="request_timeout")
