"""A request's body that is read whole: at most 1 MiB, within 30 s."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gateway.errors import HttpError
from gateway.stream import ClientGone, Receive

MAX_BYTES = 1 << 20
SECONDS = 30.0
"""How long a body may take to arrive."""


async def read(headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
    """Reads a body.

    Raises:
        ClientGone: The client left.
        HttpError: 408 or 413.
    """
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" not in headers and length in (b"", b"0"):
        return b""
    if length and (not length.isdigit() or int(length) > MAX_BYTES):
        raise _too_large()
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BYTES:
                    raise _too_large()
    except TimeoutError as error:
        raise HttpError(
            408,
            "DEADLINE_EXCEEDED",
            f"the body must arrive within {SECONDS:.0f} s",
            reason="BODY_TIMEOUT",
            headers={"connection": "close"},
        ) from error
    return bytes(body)


async def read_json(headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
    """Reads a JSON body, which may be empty; it is not parsed.

    Raises:
        ClientGone: The client left.
        HttpError: 408, 413 or 415.
    """
    body = await read(headers, receive)
    if body:
        _check_json_type(headers)
    return body


def _check_json_type(headers: Mapping[bytes, bytes]) -> None:
    text = headers.get(b"content-type", b"").decode("latin-1").lower()
    kind, _, parameters = text.partition(";")
    charset = parameters.strip().removeprefix("charset=").strip('"')
    encoding = headers.get(b"content-encoding", b"identity")
    if (
        kind.strip() != "application/json"
        or charset not in ("", "utf-8")
        or encoding != b"identity"
    ):
        raise HttpError(
            415,
            "INVALID_ARGUMENT",
            f"send Content-Type: application/json, in UTF-8 and uncompressed, not {text!r}",
            reason="UNSUPPORTED_MEDIA_TYPE",
        )


def _too_large() -> HttpError:
    return HttpError(
        413,
        "RESOURCE_EXHAUSTED",
        f"a body that is no file may have {MAX_BYTES} bytes",
        reason="BODY_TOO_LARGE",
    )
