"""A file as the raw body of an answer, passed on from a stream of google.api.HttpBody.

A service says what the file is in a FileInfo among the extensions of the first chunk; without one
the resource that the file belongs to is asked. One chunk is held at a time: the next one is read
when the client has taken the last, so a slow client slows the service down. What fails before the
first chunk is an ordinary HTTP error; what fails later breaks the connection off, because a body
that just ends would look whole.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

from detflow.errors import DeadlineExceeded
from detflow.v1.common_pb2 import FileInfo
from gateway import conditions, ranges, security
from gateway.stream import EOF, Receive, Send, unless_gone

IDLE_SECONDS = 60.0
"""How long the service may send nothing."""

CONTENT_TYPES = ("application/octet-stream", "application/zip", "application/json")
"""What the document says of the body, unless the RPC is among the next."""

CONTENT_TYPES_WITH_INFO = {
    "GetInferenceImage": ("image/jpeg", "image/png"),
    "DownloadReport": ("text/html", "application/zip"),
    "DownloadComparisonReport": ("text/html", "application/zip"),
    "DownloadChart": ("image/png", "image/svg+xml"),
    "DownloadTable": ("text/csv", "application/json"),
}
"""What the document says of the bodies of RPCs that send a FileInfo."""

IN_PARTS = frozenset((*CONTENT_TYPES_WITH_INFO, "DownloadExport"))
"""RPCs whose files have size and ETag before they are sent: parts of them can be asked for."""

_INLINE_TYPES = frozenset(("image/jpeg", "image/png", "image/svg+xml", "text/html"))
_EXTENSIONS = {"application/zip": ".zip", "application/json": ".json"}
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9.+-]{1,63}/[A-Za-z0-9.+-]{1,63}")
_ETAG = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 ._()+-]")


async def send_file(
    call: Any,
    describe: Callable[[], Awaitable[Any]],
    request_headers: Mapping[bytes, bytes],
    receive: Receive,
    send: Send,
    *,
    is_head: bool = False,
) -> None:
    """Sends a call's chunks as one body.

    Args:
        call: grpc.aio unary-stream call of HttpBody messages; cancelled when this returns.
        describe: Gets the resource of a file without FileInfo: with `file_name` and, once it is
            known, `object.size_bytes`; or with `display_name`, if the file is made while it is
            sent; or None, if there is none.
        request_headers: If-None-Match: of a file that the client has already it is only told so.
            Range: of a file with size and ETag only that part is sent.
        receive: ASGI receive; tells of a disconnect.
        send: ASGI send; waits until there is room.
        is_head: Whether only the headers are asked for.

    Raises:
        ClientGone: The client left.
        DeadlineExceeded: DOWNLOAD_STALLED.
        HttpError: 416, the file has no such part.
        grpc.aio.AioRpcError: The service failed; if something was sent already, the caller has to
            break off the connection.
    """
    try:
        chunk = await _read(call, receive)
        info = None if chunk is EOF else _info(chunk)
        if info is None:
            # Now it is known that there is a file, so its size is known too.
            info = _describe(await describe(), _media_type(chunk))
        headers = _headers(chunk, info)
        etag = f'"{info.etag}"' if info.etag else ""
        if etag and conditions.names(request_headers.get(b"if-none-match", b""), etag):
            # With the headers of the file: what the client has takes them over.
            await _start(send, 304, headers)
            await send({"type": "http.response.body", "body": b""})
            return
        part = ranges.WHOLE
        if etag and info.size_bytes:
            headers.append((b"accept-ranges", b"bytes"))
            if not is_head:
                part = ranges.wanted(request_headers, etag, info.size_bytes)
        length = info.size_bytes
        code = 200
        if part is not ranges.WHOLE:
            code, length = 206, part.end - part.start
            place = f"bytes {part.start}-{part.end - 1}/{info.size_bytes}"
            headers.append((b"content-range", place.encode()))
        if length:
            headers.append((b"content-length", str(length).encode()))
        position = 0
        # Services send a file from its beginning, so that they can check its hash.
        while chunk is not EOF and position + len(chunk.data) <= part.start:
            position += len(chunk.data)
            chunk = await _read(call, receive)
        await _start(send, code, headers)
        while chunk is not EOF and position < part.end and not is_head:
            data = chunk.data[max(part.start - position, 0) : part.end - position]
            position += len(chunk.data)
            await send({"type": "http.response.body", "body": data, "more_body": True})
            chunk = await _read(call, receive)
        await send({"type": "http.response.body", "body": b""})
    finally:
        call.cancel()


async def _start(send: Send, code: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": code, "headers": headers})


async def _read(call: Any, receive: Receive) -> Any:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await unless_gone(call.read(), receive)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the file did not go on for {IDLE_SECONDS:.0f} s; download it again",
            reason="DOWNLOAD_STALLED",
        ) from error


def _info(first: Any) -> FileInfo | None:
    """Returns what the service says of the file."""
    info = FileInfo()
    if not any(extension.Unpack(info) for extension in first.extensions):
        return None
    info.etag = _valid_etag(info.etag)
    return info


def _valid_etag(text: str) -> str:
    """Returns what fits between the quotes of an ETag, or nothing."""
    return text if _ETAG.fullmatch(text) else ""


def _describe(resource: Any, kind: str) -> FileInfo:
    """Says of a file what its resource says; else it is named after what it holds."""
    if resource is None:
        return FileInfo()
    fields = resource.DESCRIPTOR.fields_by_name
    if "file_name" not in fields:
        name = getattr(resource, "display_name", "")
        return FileInfo(file_name=f"{name}{_EXTENSIONS.get(kind, '')}")
    info = FileInfo(file_name=resource.file_name)
    if "object" in fields and resource.HasField("object"):
        info.size_bytes = resource.object.size_bytes
        info.etag = _valid_etag(resource.object.sha256)
    return info


def _media_type(first: Any) -> str:
    given = "" if first is EOF else first.content_type.removesuffix("; charset=utf-8")
    return given if _MEDIA_TYPE.fullmatch(given) else CONTENT_TYPES[0]


def _headers(first: Any, info: FileInfo) -> list[tuple[bytes, bytes]]:
    kind = _media_type(first)
    inline = info.inline and kind in _INLINE_TYPES
    charset = "; charset=utf-8" if kind.startswith("text/") else ""
    headers = [
        (b"content-type", f"{kind}{charset}".encode()),
        (b"content-disposition", disposition(info.file_name, inline=inline).encode()),
    ]
    if info.etag:
        headers.append((b"etag", f'"{info.etag}"'.encode()))
        headers.append((b"cache-control", b"private, no-cache"))
    if inline:
        headers.append((b"content-security-policy", security.SANDBOX_POLICY))
    return headers


def disposition(file_name: str, *, inline: bool = False) -> str:
    """Content-Disposition of a body with a name, whatever its letters (RFC 6266)."""
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", file_name).lstrip(".") or "download"
    return (
        f'{"inline" if inline else "attachment"}; filename="{_NOT_PLAIN.sub("_", name)}"; '
        f"filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    )
