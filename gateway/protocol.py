"""HTTP/1.1 as uvicorn speaks it, with bounds on connections and on what is not body.

uvicorn's own protocol collects headers without limit, and its parser joins a long one piece by
piece: 100 MB of header would block the gateway for minutes. It also waits for the next header
without limit, so that clients that send a byte now and then would hold all connections.
"""

from __future__ import annotations

import asyncio
import http
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import errors
from gateway.errors import HttpError

MAX_HEAD_BYTES = 64 << 10
"""Request line, headers, chunk sizes and trailers of one request; a body adds room for chunks."""

MAX_CONNECTIONS = 4096
"""Open connections; whoever comes then is told to come back."""

HEAD_SECONDS = 20.0
"""How long a connection on which no request is under way may take to send the head of one."""

ABORT = "detflow.abort"
"""Extension of the ASGI scope: `abort()` breaks the connection off, so that no half looks whole."""

_ROOM_PER_BODY_BYTE = 8  # a chunk of one byte has five more around it


class HeadTooLarge(Exception):
    """A request line or headers beyond the limit."""


class BoundedProtocol(HttpToolsProtocol):
    """Refuses what is no HTTP, and too much of what is no body, with the errors of the gateway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_bytes = 0
        self._num_body_bytes = 0
        self._num_head_bytes = 0
        self._began = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(_too_many_connections())
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._cancel_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what arrived, unless it is too much."""
        if self.transport.is_closing():
            return
        self._began = False
        super().data_received(data)
        if self._is_idle() and not self.transport.is_closing():
            self._expect_head()  # part of one has come, or what is left of a body
        # Of a piece in which a request began, the bytes before it belong to another one.
        self._num_bytes += 0 if self._began else len(data)
        room = MAX_HEAD_BYTES + self._num_body_bytes * _ROOM_PER_BODY_BYTE
        if self._num_bytes - self._num_body_bytes > room and not self.transport.is_closing():
            self._num_head_bytes = self._num_bytes
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begins to count, and tells the application how to break off."""
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}
        self._began = True
        self._num_bytes = self._num_body_bytes = self._num_head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Counts the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts a header or trailer."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begins the request."""
        self._cancel_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Counts the body."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Says what is wrong in the shape of every error, and closes the connection.

        In the middle of an answer nothing can be said any more.
        """
        too_large = self._num_head_bytes > MAX_HEAD_BYTES
        self._refuse(_too_large() if too_large else _no_http())

    def _refuse(self, error: HttpError) -> None:
        if self._is_idle() or not self.cycle.response_started:
            code, headers, body = errors.answer(error, "")
            headers |= {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            head = f"HTTP/1.1 {code} {http.HTTPStatus(code).phrase}\r\n{lines}\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _is_idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self._is_idle() and not self.transport.is_closing():
            self._refuse(_too_slow())

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge  # the parser turns it into one of its own errors


def _too_many_connections() -> HttpError:
    return HttpError(
        503,
        "UNAVAILABLE",
        f"{MAX_CONNECTIONS} connections are open already; come back in a moment",
        reason="TOO_MANY_CONNECTIONS",
        headers={"retry-after": "1"},
    )


def _too_slow() -> HttpError:
    return HttpError(
        408,
        "DEADLINE_EXCEEDED",
        f"request line and headers must arrive within {HEAD_SECONDS:g} s",
        reason="HEADERS_TIMEOUT",
    )


def _too_large() -> HttpError:
    return HttpError(
        431,
        "RESOURCE_EXHAUSTED",
        f"request line and headers may have {MAX_HEAD_BYTES} bytes; send less",
        reason="HEADERS_TOO_LARGE",
    )


def _no_http() -> HttpError:
    return HttpError(
        400,
        "INVALID_ARGUMENT",
        "this is no HTTP/1.1 request; check method, request line, headers and chunk sizes",
        reason="MALFORMED_HTTP",
    )
