"""An archive as the raw body of a POST, passed on to DatasetService.UploadArchive while it arrives.

At most one chunk of 1 MiB is held; a slow store slows the client down through TCP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from detflow.v1 import dataset_pb2
from gateway.errors import HttpError
from gateway.stream import Receive

CHUNK_BYTES = 1 << 20
IDLE_SECONDS = 60.0
"""How long a client may send nothing."""

CONTENT_TYPES = ("application/zip", "application/x-zip-compressed", "application/octet-stream")


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def check_headers(headers: Mapping[bytes, bytes], max_bytes: int) -> None:
    """Checks what can be said before the first byte.

    Raises:
        HttpError: 415 or 413.
    """
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if kind not in CONTENT_TYPES or headers.get(b"content-encoding", b"identity") != b"identity":
        raise HttpError(
            415,
            "INVALID_ARGUMENT",
            f"send the archive itself, with Content-Type: application/zip, not {kind!r}",
            reason="UNSUPPORTED_MEDIA_TYPE",
        )
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)


async def pass_on(call: Any, parent: str, receive: Receive, max_bytes: int) -> Message:
    """Streams the body into the call and returns the Upload.

    Args:
        call: grpc.aio stream-unary call; cancelled unless it answers.
        parent: projects/{project}.
        receive: ASGI receive.
        max_bytes: Largest archive.

    Raises:
        ClientGone: The client went away; the call is cancelled.
        HttpError: 408 or 413; the call is cancelled.
        grpc.aio.AioRpcError: The service refused it.
    """
    try:
        await call.wait_for_connection()
        if await _write(call, dataset_pb2.UploadArchiveRequest(parent=parent)):
            await _write_body(call, receive, max_bytes)
        answer: Message = await call
        return answer
    finally:
        call.cancel()


async def _write_body(call: Any, receive: Receive, max_bytes: int) -> None:
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
                f"nothing arrived for {IDLE_SECONDS:.0f} s; send the archive again",
                reason="BODY_TIMEOUT",
                headers={"connection": "close"},
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientGone
        body = message.get("body", b"")
        more = message.get("more_body", False)
        num_bytes += len(body)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        waiting += body
        while len(waiting) >= CHUNK_BYTES or (waiting and not more):
            chunk = bytes(waiting[:CHUNK_BYTES])
            del waiting[:CHUNK_BYTES]
            if not await _write(call, dataset_pb2.UploadArchiveRequest(chunk=chunk)):
                return
    if await _write(call, dataset_pb2.UploadArchiveRequest(size_bytes=num_bytes)):
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


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(
        413,
        "RESOURCE_EXHAUSTED",
        f"an archive may have {max_bytes} bytes; split it, or raise DETFLOW_MAX_UPLOAD_BYTES",
        reason="ARCHIVE_LIMIT",
    )
