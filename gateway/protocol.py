"""HTTP/1.1 as uvicorn speaks it, with a bound on what is not body.

uvicorn's own protocol collects headers without limit, and its parser joins a long one piece by
piece: 100 MB of header would block the gateway for minutes.
"""

from __future__ import annotations

import http
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import errors
from gateway.errors import HttpError

MAX_HEAD_BYTES = 64 << 10
"""Request line, headers, chunk sizes and trailers of one request; a body adds room for chunks."""

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

    def data_received(self, data: bytes) -> None:
        """Parses what arrived, unless it is too much."""
        self._began = False
        super().data_received(data)
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

    def on_body(self, body: bytes) -> None:
        """Counts the body."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Says what is wrong in the shape of every error, and closes the connection.

        In the middle of an answer nothing can be said any more.
        """
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            error = _too_large() if self._num_head_bytes > MAX_HEAD_BYTES else _no_http()
            code, _, body = errors.answer(error, "")
            phrase = http.HTTPStatus(code).phrase
            head = (
                f"HTTP/1.1 {code} {phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge  # the parser turns it into one of its own errors


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
