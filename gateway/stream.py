"""Server-streaming RPCs as Server-Sent Events.

Each message is one event: `id:` is its cursor, `event:` the case of its oneof, `data:` the whole
message as JSON. A reconnect with Last-Event-ID (or `?cursor=`) resumes behind it. An error before
anything was sent is an ordinary HTTP error; a later one is `event: error`. `event: end` says that
nothing will follow, so don't reconnect.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

import grpc
import orjson
from google.protobuf.message import Message

from gateway import errors, transcode

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

T = TypeVar("T")

FIRST_MESSAGE_SECONDS = 2.0
"""How long the headers wait for a first message: what fails at once is an ordinary HTTP error."""

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
"""What a call's `read()` returns behind its last message."""
_MAX_KEPT_BYTES = 16 << 10  # larger messages are rendered anew for each watcher
HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def resume(request: Any, headers: Mapping[bytes, bytes]) -> None:
    """Puts the Last-Event-ID into the request; it is newer than the `?cursor=` of the URL."""
    last = headers.get(b"last-event-id")
    if last is not None:
        request.cursor = last.decode("latin-1")


def event(message: Message) -> bytes:
    """Renders one message of a stream."""
    kind: Any = type(message)  # which mypy does not take for hashable
    data = message.SerializeToString()
    return _render_once(kind, data) if len(data) <= _MAX_KEPT_BYTES else _render(message)


def _render(message: Message) -> bytes:
    oneofs = message.DESCRIPTOR.oneofs
    case = message.WhichOneof(oneofs[0].name) if oneofs else None
    return _frame(case or "message", transcode.encode(message), getattr(message, "cursor", ""))


@functools.lru_cache(maxsize=64)
def _render_once(kind: type[Message], data: bytes) -> bytes:
    """Renders what reaches all watchers of a thing at once, in the same bytes."""
    return _render(kind.FromString(data))


def _frame(name: str, data: bytes, cursor: str = "") -> bytes:
    head = f"id: {cursor}\n" if cursor.isprintable() and cursor else ""
    return f"{head}event: {name}\ndata: ".encode() + data + b"\n\n"


async def send_events(
    call: Any, receive: Receive, send: Send, draining: asyncio.Event, request_id: str
) -> None:
    """Sends a call's messages until it ends, the client leaves, or the gateway drains.

    Args:
        call: grpc.aio unary-stream call; it is cancelled when this returns early.
        receive: ASGI receive; tells of a disconnect.
        send: ASGI send.
        draining: Set when the gateway is about to stop.
        request_id: Shown in errors.

    Raises:
        grpc.aio.AioRpcError: The call failed before anything was sent.
    """
    answer = _Events(send)
    passing_on = asyncio.create_task(_pass_on(call, answer, request_id))
    gone = asyncio.create_task(disconnected(receive))
    drain = asyncio.create_task(draining.wait())
    tasks = (passing_on, gone, drain)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            return
        if not passing_on.done():
            passing_on.cancel()
            await asyncio.wait([passing_on])
        if not passing_on.cancelled():
            passing_on.result()
            return
        await answer.put(b"retry: 1000\n: restarting, reconnect with Last-Event-ID\n\n", last=True)
    finally:
        call.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Events:
    """The answer to one watcher."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def put(self, frame: bytes, *, last: bool = False) -> None:
        """Sends a frame, the headers before the first one."""
        if not self.started:
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            self.started = True
        await self._send({"type": "http.response.body", "body": frame, "more_body": not last})


async def _pass_on(call: Any, answer: _Events, request_id: str) -> None:
    """Sends a call's messages until it ends.

    Raises:
        grpc.aio.AioRpcError: The call failed before anything was sent.
    """
    first = asyncio.create_task(call.read())
    try:
        await asyncio.wait([first], timeout=FIRST_MESSAGE_SECONDS)
        if not first.done():
            await answer.put(b": open\n\n")
        # No task for each message from here on: a thousand watchers have ten thousand a second.
        message = await first
        while message is not EOF:
            await answer.put(event(message))
            message = await call.read()
    except grpc.aio.AioRpcError as error:
        if not answer.started:
            raise
        status = errors.status_of(error, request_id)
        value = errors.body_of(status, errors.http_of(status))
        await answer.put(_frame("error", orjson.dumps(value)), last=True)
    else:
        await answer.put(_frame("end", b"{}"), last=True)
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Waits until the client has closed the connection; what it still sends is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Awaits `work`, and cancels it when the client leaves.

    Raises:
        ClientGone: The client left first.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
