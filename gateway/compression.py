"""gzip of answers.

Only JSON that answers a GET with success is packed. It holds no secrets: those of webhooks are
shown in answers to POST alone. And nothing that a browser adds by itself, such as a cookie, lets
anybody in. So the length of an answer gives nothing away that its asker could not read (BREACH).
Errors, which repeat what the caller wrote, streams and files are sent as they are.
"""

from __future__ import annotations

import asyncio
import gzip
import re

MIN_BYTES = 1000
"""Below, the headers are most of what is sent."""

_THREAD_BYTES = 64 << 10  # packed in a millisecond; more would hold up the other requests
_LEVEL = 1
_GZIP = re.compile(rb"(?:x-)?gzip(?:[ \t]*;[ \t]*q=([0-9.]+))?", re.IGNORECASE)


def is_welcome(accept_encoding: bytes) -> bool:
    """Whether a client takes gzip."""
    for one in accept_encoding.split(b","):
        match = _GZIP.fullmatch(one.strip())
        if match is not None:
            return match[1] is None or match[1].strip(b"0.") != b""
    return False


async def pack(body: bytes) -> bytes:
    """Packs a body, a large one in a thread."""
    if len(body) < _THREAD_BYTES:
        return gzip.compress(body, _LEVEL, mtime=0)
    return await asyncio.to_thread(gzip.compress, body, _LEVEL, mtime=0)
