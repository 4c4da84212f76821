"""A file as the raw body of an answer, passed on from a stream of google.api.HttpBody.

One chunk is held at a time: the next one is read when the client has taken the last, so a slow
client slows the service down. What fails before the first chunk is an ordinary HTTP error; what
fails later breaks the connection off, because a body that just ends would look whole.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from detflow.errors import DeadlineExceeded
from gateway.stream import EOF, Receive, Send, unless_gone

IDLE_SECONDS = 60.0
"""How long the service may send nothing."""

CONTENT_TYPES = ("application/octet-stream", "application/zip", "application/json")
"""What the document says of the body."""

_EXTENSIONS = {"application/zip": ".zip", "application/json": ".json"}
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9.+-]{1,63}/[A-Za-z0-9.+-]{1,63}")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 ._()+-]")


async def send_file(
    call: Any, describe: Callable[[], Awaitable[Any]], receive: Receive, send: Send
) -> None:
    """Sends a call's chunks as one body.

    Args:
        call: grpc.aio unary-stream call of HttpBody messages; cancelled when this returns.
        describe: Gets the resource with `file_name` and, once it is known, `object.size_bytes`; or
            with `display_name`, if the file is made while it is sent.
        receive: ASGI receive; tells of a disconnect.
        send: ASGI send; waits until there is room.

    Raises:
        ClientGone: The client left.
        DeadlineExceeded: DOWNLOAD_STALLED.
        grpc.aio.AioRpcError: The service failed; if something was sent already, the caller has to
            break off the connection.
    """
    try:
        chunk = await _read(call, receive)
        # Now it is known that there is a file, so its size is known too.
        headers = _headers(chunk, await describe())
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while chunk is not EOF:
            await send({"type": "http.response.body", "body": chunk.data, "more_body": True})
            chunk = await _read(call, receive)
        await send({"type": "http.response.body", "body": b""})
    finally:
        call.cancel()


async def _read(call: Any, receive: Receive) -> Any:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await unless_gone(call.read(), receive)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the file did not go on for {IDLE_SECONDS:.0f} s; download it again",
            reason="DOWNLOAD_STALLED",
        ) from error


def _headers(first: Any, resource: Any) -> list[tuple[bytes, bytes]]:
    given = "" if first is EOF else first.content_type
    kind = given if _MEDIA_TYPE.fullmatch(given) else CONTENT_TYPES[0]
    headers = [
        (b"content-type", kind.encode()),
        (b"content-disposition", disposition(_file_name(resource, kind)).encode()),
    ]
    if "object" in resource.DESCRIPTOR.fields_by_name and resource.HasField("object"):
        headers.append((b"content-length", str(resource.object.size_bytes).encode()))
    return headers


def _file_name(resource: Any, kind: str) -> str:
    """Returns the name of a file, or what it holds with the extension of its kind."""
    if "file_name" in resource.DESCRIPTOR.fields_by_name:
        return str(resource.file_name)
    return str(resource.display_name) + _EXTENSIONS.get(kind, "")


def disposition(file_name: str) -> str:
    """Content-Disposition that saves a body under a name, whatever its letters (RFC 6266)."""
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", file_name).lstrip(".") or "download"
    return (
        f'attachment; filename="{_NOT_PLAIN.sub("_", name)}"; '
        f"filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    )
