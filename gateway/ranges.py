"""Part of a file: Range and If-Range (RFC 9110, section 14).

One range of bytes is served. What is malformed, of another unit or several ranges at once is
answered with the whole file, as the standard allows.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.errors import HttpError

_RANGE = re.compile(
    rb"bytes=[ \t]*(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))[ \t]*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [start, end) of a file."""

    start: int
    end: int


WHOLE = Part(0, sys.maxsize)


def wanted(headers: Mapping[bytes, bytes], etag: str, size_bytes: int) -> Part:
    """Says which part of a file is asked for; WHOLE if it is all.

    Args:
        headers: Of the request.
        etag: Of the file, with its quotes.
        size_bytes: Of the file, above 0.

    Raises:
        HttpError: 416, the file has no such bytes.
    """
    match = _RANGE.fullmatch(headers.get(b"range", b""))
    if match is None:
        return WHOLE
    # A weak ETag or a date never matches: only the very same file can be gone on with.
    if headers.get(b"if-range", etag.encode()) != etag.encode():
        return WHOLE
    first, last, suffix = (int(one) if one else None for one in match.groups())
    if first is None:
        start, end = max(size_bytes - (suffix or 0), 0), size_bytes
    elif last is not None and last < first:
        return WHOLE
    else:
        start, end = first, size_bytes if last is None else min(last + 1, size_bytes)
    if start >= size_bytes:
        raise HttpError(
            416,
            "OUT_OF_RANGE",
            f"the file has {size_bytes} bytes; ask for some of them",
            reason="RANGE_NOT_SATISFIABLE",
            headers={"content-range": f"bytes */{size_bytes}"},
        )
    return Part(start, end)
