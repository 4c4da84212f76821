"""Server-streaming RPCs as Server-Sent Events.

Each message is one event: `id:` is its cursor, `event:` the case of its oneof, `data:` the whole
message as JSON. A reconnect with Last-Event-ID (or `?cursor=`) resumes behind it. An error before
anything was sent is an ordinary HTTP error; a later one is `event: error`. `event: end` says that
nothing will follow, so don't reconnect.
"""

from __future__ import annotations

import asyncio
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
    oneofs = message.DESCRIPTOR.oneofs
    case = message.WhichOneof(oneofs[0].name) if oneofs else None
    return _frame(case or "message", transcode.encode(message), getattr(message, "cursor", ""))


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
    gone = asyncio.create_task(disconnected(receive))
    drain = asyncio.create_task(draining.wait())
    reading: asyncio.Task[Any] | None = None
    started = False
    try:
        while True:
            reading = reading or asyncio.create_task(call.read())
            wait_seconds = None if started else FIRST_MESSAGE_SECONDS
            await asyncio.wait(
                {reading, gone, drain}, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if gone.done():
                return
            frame, last = b"", False
            if reading.done():
                frame, last = _outcome(reading, started, request_id)
                reading = None
            elif drain.done():
                frame, last = b"retry: 1000\n: restarting, reconnect with Last-Event-ID\n\n", True
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                started = True
                frame = frame or b": open\n\n"
            await send({"type": "http.response.body", "body": frame, "more_body": not last})
            if last:
                return
    finally:
        call.cancel()
        for task in (gone, drain, reading):
            if task is not None:
                task.cancel()
        await asyncio.gather(
            *(task for task in (gone, drain, reading) if task is not None), return_exceptions=True
        )


def _outcome(reading: asyncio.Task[Any], started: bool, request_id: str) -> tuple[bytes, bool]:
    """What a finished read sends, and whether it is the last thing."""
    try:
        message = reading.result()
    except grpc.aio.AioRpcError as error:
        if not started:
            raise
        status = errors.status_of(error, request_id)
        value = errors.body_of(status, errors.http_of(status))
        return _frame("error", orjson.dumps(value)), True
    if message is EOF:
        return _frame("end", b"{}"), True
    return event(message), False


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
