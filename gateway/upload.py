"""A file as the raw body of a POST, passed on to a client-streaming RPC while it arrives.

At most one chunk of 1 MiB is held; a slow store slows the client down through TCP. The RPC's
messages are an opening that says where to, chunks, and at the end the size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from gateway.errors import HttpError
from gateway.stream import ClientGone, Receive

CHUNK_BYTES = 1 << 20
IDLE_SECONDS = 60.0
"""How long a client may send nothing."""

_ZIP = ("application/zip", "application/x-zip-compressed")
_BYTES = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the body of a route is.

    Attributes:
        noun: What it is called.
        content_types: Media types that are taken; the first is the one to send.
        limit_reason: Reason of the error for one that is too large.
    """

    noun: str
    content_types: tuple[str, ...]
    limit_reason: str


KINDS = {
    "UploadArchive": Kind(
        noun="archive", content_types=(*_ZIP, _BYTES), limit_reason="ARCHIVE_LIMIT"
    ),
    # A file of torch.save is a zip, and some clients say so.
    "UploadWeights": Kind(
        noun="weights file", content_types=(_BYTES, *_ZIP), limit_reason="WEIGHTS_LIMIT"
    ),
}
"""By the name of the RPC."""


def check_headers(kind: Kind, headers: Mapping[bytes, bytes], max_bytes: int) -> None:
    """Checks what can be said before the first byte.

    Raises:
        HttpError: 415 or 413.
    """
    given = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    encoding = headers.get(b"content-encoding", b"identity")
    if given not in kind.content_types or encoding != b"identity":
        raise HttpError(
            415,
            "INVALID_ARGUMENT",
            f"send the {kind.noun} itself, with Content-Type: {kind.content_types[0]}, not"
            f" {given!r}",
            reason="UNSUPPORTED_MEDIA_TYPE",
        )
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(kind, max_bytes)


async def pass_on(
    call: Any, opening: Message, receive: Receive, max_bytes: int, kind: Kind
) -> Message:
    """Streams the body into the call and returns its answer.

    Args:
        call: grpc.aio stream-unary call; cancelled unless it answers.
        opening: Its first message.
        receive: ASGI receive.
        max_bytes: Largest body.
        kind: What the body is.

    Raises:
        ClientGone: The client went away; the call is cancelled.
        HttpError: 408 or 413; the call is cancelled.
        grpc.aio.AioRpcError: The service refused it.
    """
    try:
        await call.wait_for_connection()
        if await _write(call, opening):
            await _write_body(call, type(opening), receive, max_bytes, kind)
        answer: Message = await call
        return answer
    finally:
        call.cancel()


async def _write_body(
    call: Any, make: type[Message], receive: Receive, max_bytes: int, kind: Kind
) -> None:
    waiting = bytearray()
    num_bytes, more = 0, True
    while more:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                message = await receive()
        except TimeoutError as error:
            raise HttpError(
                408,
                "DEADLINE_EXCEEDED",
                f"nothing arrived for {IDLE_SECONDS:.0f} s; send the {kind.noun} again",
                reason="BODY_TIMEOUT",
                headers={"connection": "close"},
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientGone
        body = message.get("body", b"")
        more = message.get("more_body", False)
        num_bytes += len(body)
        if num_bytes > max_bytes:
            raise _too_large(kind, max_bytes)
        waiting += body
        while len(waiting) >= CHUNK_BYTES or (waiting and not more):
            chunk = bytes(waiting[:CHUNK_BYTES])
            del waiting[:CHUNK_BYTES]
            if not await _write(call, make(chunk=chunk)):
                return
    if await _write(call, make(size_bytes=num_bytes)):
        await call.done_writing()


async def _write(call: Any, message: Message) -> bool:
    """Writes one message; False if the service has answered already, and waits for no more.

    Below `call.write`: when the answer comes while a message is on its way, that would put an
    INTERNAL of its own in the answer's place.
    """
    if call.done():
        return False
    try:
        await call._cython_call.send_serialized_message(message.SerializeToString())
    except cygrpc.InternalError:
        return False
    return True


def _too_large(kind: Kind, max_bytes: int) -> HttpError:
    return HttpError(
        413,
        "RESOURCE_EXHAUSTED",
        f"the {kind.noun} may have {max_bytes} bytes; send a smaller one, or raise"
        " DETFLOW_MAX_UPLOAD_BYTES",
        reason=kind.limit_reason,
    )
