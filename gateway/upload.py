"""A file as the raw body of a POST, passed on to a client-streaming RPC while it arrives.

At most one chunk of 1 MiB is held; a slow store slows the client down through TCP. The RPC's
messages are an opening that says where to, chunks, and at the end the size. A resumable upload
needs no end: what came before the client went away is passed on and kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from detflow import errors
from detflow.uploads import MAX_IMAGE_BYTES, MAX_WEIGHTS_BYTES
from detflow.v1 import dataset_pb2
from gateway.errors import HttpError, status_of
from gateway.stream import ClientGone, Receive, unless_gone

CHUNK_BYTES = 1 << 20
IDLE_SECONDS = 60.0
"""How long a client may send nothing."""

SETTLE_SECONDS = 30.0
"""How long a service may take to store what came before the client went away."""

_ZIP = ("application/zip", "application/x-zip-compressed")
_TAR = ("application/x-tar", "application/gzip", "application/x-gzip")
_BYTES = "application/octet-stream"
_IMAGES = ("image/jpeg", "image/png", "image/bmp", "image/webp", "image/tiff")
_PARTS = ("application/partial-upload", "application/offset+octet-stream")  # of the drafts, tus
_OFFSET = re.compile(rb"[0-9]{1,18}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the body of a route is.

    Attributes:
        noun: What it is called.
        content_types: Media types that are taken; the first is the one to send.
        limit_reason: Reason of the error for one that is too large.
        also_too_large: Reasons for which the service finds one too large.
        max_bytes: Largest one, whatever the settings allow; None where only they limit it.
        is_resumable: Whether it is a part, from the offset that a header gives, of what may come in
            several requests.
        is_question: Whether all that comes of it is the answer, so that nobody works for a client
            that is gone.
    """

    noun: str
    content_types: tuple[str, ...]
    limit_reason: str
    also_too_large: tuple[str, ...] = ()
    max_bytes: int | None = None
    is_resumable: bool = False
    is_question: bool = False

    def limit(self, allowed: int) -> int:
        """Returns the largest one where the settings allow so much."""
        return allowed if self.max_bytes is None else min(allowed, self.max_bytes)


KINDS = {
    "UploadArchive": Kind(
        noun="archive", content_types=(*_ZIP, *_TAR, _BYTES), limit_reason="ARCHIVE_LIMIT"
    ),
    "WriteUpload": Kind(
        noun="archive",
        content_types=(_BYTES, *_PARTS, *_ZIP, *_TAR),
        limit_reason="ARCHIVE_LIMIT",
        is_resumable=True,
    ),
    # A file of torch.save is a zip, and some clients say so.
    "UploadWeights": Kind(
        noun="weights file",
        content_types=(_BYTES, *_ZIP),
        limit_reason="WEIGHTS_LIMIT",
        max_bytes=MAX_WEIGHTS_BYTES,
    ),
    # What an image is is decided by its content.
    "PredictImage": Kind(
        noun="image",
        content_types=(*_IMAGES, _BYTES),
        limit_reason="IMAGE_LIMIT",
        also_too_large=("IMAGE_TOO_LARGE",),
        max_bytes=MAX_IMAGE_BYTES,
        is_question=True,
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


RESOURCE = dataset_pb2.Upload.DESCRIPTOR.full_name
"""What is answered about with headers that say how far it is."""


def read_offset(headers: Mapping[bytes, bytes]) -> int:
    """Reads where the bytes of a part belong.

    Raises:
        InvalidArgument: The header Upload-Offset is missing or no number.
    """
    text = headers.get(b"upload-offset", b"")
    if not _OFFSET.fullmatch(text):
        raise errors.bad_field(
            "Upload-Offset",
            "BAD_OFFSET",
            f"the header must be the upload's committedBytes, not {text.decode('latin-1')!r}",
        )
    return int(text)


def offset_headers(response: Message) -> dict[str, str]:
    """Says in headers how far an upload is, as the drafts of resumable uploads do."""
    if not isinstance(response, dataset_pb2.Upload):
        return {}
    is_complete = response.state == dataset_pb2.Upload.RECEIVED
    return {
        "upload-offset": str(response.committed_bytes),
        "upload-complete": "?1" if is_complete else "?0",
    }


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
        ClientGone: The client went away.
        HttpError: 408 or 413.
        grpc.aio.AioRpcError: The service refused it for another reason.
    """
    try:
        await call.wait_for_connection()
        if await _write(call, opening):
            await _write_body(call, type(opening), receive, max_bytes, kind)
        answer: Message = await (unless_gone(_outcome(call), receive) if kind.is_question else call)
        return answer
    except grpc.aio.AioRpcError as error:
        refusal = errors.from_status(status_of(error, request_id=""))
        if refusal.reason in (kind.limit_reason, *kind.also_too_large):
            raise _large(refusal.message, refusal.reason) from error
        raise
    except (ClientGone, HttpError):
        if kind.is_resumable:
            await _settle(call)
        raise
    finally:
        call.cancel()


async def _outcome(call: Any) -> Message:
    answer: Message = await call
    return answer


async def _settle(call: Any) -> None:
    """Ends a call in order, so that the service keeps what has come."""
    with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):
        async with asyncio.timeout(SETTLE_SECONDS):
            await call.done_writing()
            await call


async def _write_body(
    call: Any, make: type[Message], receive: Receive, max_bytes: int, kind: Kind
) -> None:
    num_bytes = 0
    async with contextlib.aclosing(_chunks(receive, max_bytes, kind)) as chunks:
        async for chunk in chunks:
            num_bytes += len(chunk)
            if not await _write(call, make(chunk=chunk)):
                return
    if kind.is_resumable or await _write(call, make(size_bytes=num_bytes)):
        await call.done_writing()


async def _chunks(receive: Receive, max_bytes: int, kind: Kind) -> AsyncGenerator[bytes, None]:
    """Yields a body in chunks; what came before it breaks off is yielded before the error."""
    waiting = bytearray()
    num_bytes, more = 0, True
    while more:
        try:
            body, more = await _receive(receive, kind)
            num_bytes += len(body)
            if num_bytes > max_bytes:
                raise _too_large(kind, max_bytes)
        except (ClientGone, HttpError):
            if waiting:
                yield bytes(waiting)
            raise
        waiting += body
        while len(waiting) >= CHUNK_BYTES or (waiting and not more):
            yield bytes(waiting[:CHUNK_BYTES])
            del waiting[:CHUNK_BYTES]


async def _receive(receive: Receive, kind: Kind) -> tuple[bytes, bool]:
    """Returns the next bytes of a body, and whether more will come."""
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            message = await receive()
    except TimeoutError as error:
        again = "go on behind what was kept" if kind.is_resumable else f"send the {kind.noun} again"
        raise HttpError(
            408,
            "DEADLINE_EXCEEDED",
            f"nothing arrived for {IDLE_SECONDS:.0f} s; {again}",
            reason="BODY_TIMEOUT",
            headers={"connection": "close"},
        ) from error
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


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
    remedy = "" if max_bytes == kind.max_bytes else ", or raise DETFLOW_MAX_UPLOAD_BYTES"
    problem = f"the {kind.noun} may have {max_bytes} bytes; send a smaller one{remedy}"
    return _large(problem, kind.limit_reason)


def _large(problem: str, reason: str) -> HttpError:
    return HttpError(413, "RESOURCE_EXHAUSTED", problem, reason=reason)
