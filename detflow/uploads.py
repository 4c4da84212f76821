"""Files that clients send in chunks, written to disk as they arrive."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from detflow.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, bad_field

Message = TypeVar("Message")

MAX_WEIGHTS_BYTES = 2 << 30
"""Largest file of weights; the sandbox that looks into it has room for twice as much."""

MAX_IMAGE_BYTES = 64 << 20
"""Largest image that a model is tried on."""


async def receive(
    requests: AsyncIterator[Any],
    path: Path,
    *,
    opening: str,
    opened: Callable[[Any], Awaitable[None]],
    max_bytes: int,
    too_large: ResourceExhausted,
    noun: str,
) -> int:
    """Writes the chunks of an upload to a file; see `receive_chunks`."""
    file: BinaryIO = await asyncio.to_thread(path.open, "wb")

    async def write(chunk: bytes) -> None:
        await asyncio.to_thread(file.write, chunk)

    try:
        return await receive_chunks(
            requests,
            write,
            opening=opening,
            opened=opened,
            max_bytes=max_bytes,
            too_large=too_large,
            noun=noun,
        )
    finally:
        await asyncio.to_thread(file.close)


async def receive_chunks(
    requests: AsyncIterator[Any],
    write: Callable[[bytes], Awaitable[None]],
    *,
    opening: str,
    opened: Callable[[Any], Awaitable[None]],
    max_bytes: int,
    too_large: ResourceExhausted,
    noun: str,
    idle_seconds: float | None = None,
) -> int:
    """Passes on the chunks of an upload.

    Args:
        requests: Messages with a oneof `part`: `opening` first, then `chunk`, last `size_bytes`.
        write: Given each chunk.
        opening: Name of the part that says where the upload belongs.
        opened: Given the first message; raises to refuse the upload.
        max_bytes: Largest file.
        too_large: Raised for a larger one.
        noun: What the file is called in errors.
        idle_seconds: How long a client may send nothing; None for ever.

    Returns:
        Its size in bytes.

    Raises:
        InvalidArgument: INVALID_FIELD: parts out of order; INCOMPLETE_UPLOAD: it was cut off.
        ResourceExhausted: `too_large`.
        DeadlineExceeded: UPLOAD_IDLE.
    """
    is_open, size_bytes, end = False, 0, -1
    while (request := await next_message(requests, idle_seconds)) is not None:
        part = request.WhichOneof("part")
        if (part == opening) == is_open:
            raise bad_field(opening, "INVALID_FIELD", "name the project in the first message only")
        if part == opening:
            await opened(request)
            is_open = True
        elif part == "size_bytes":
            end = request.size_bytes
        else:
            size_bytes += len(request.chunk)
            if size_bytes > max_bytes:
                raise too_large
            await write(request.chunk)
    # A cancelled call can look like one that has ended, so the end is said explicitly.
    if end != size_bytes:
        raise InvalidArgument(
            f"the upload was cut off after {size_bytes} bytes: its last message must give its"
            f" size; send the {noun} again",
            reason="INCOMPLETE_UPLOAD",
        )
    return size_bytes


async def next_message(
    requests: AsyncIterator[Message], idle_seconds: float | None
) -> Message | None:
    """Returns the next message of a stream, or None at its end.

    Raises:
        DeadlineExceeded: UPLOAD_IDLE: nothing came for so long.
    """
    try:
        async with asyncio.timeout(idle_seconds):
            return await anext(requests)
    except StopAsyncIteration:
        return None
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"nothing came for {idle_seconds} s; go on with the upload", reason="UPLOAD_IDLE"
        ) from error


def weights_too_large(max_bytes: int) -> ResourceExhausted:
    """Makes the error for a file of weights above a limit."""
    return ResourceExhausted(
        f"a file of weights may have {max_bytes} bytes; upload the weights alone, without the state"
        " of an optimizer",
        reason="WEIGHTS_LIMIT",
    )


@contextlib.contextmanager
def full_disk_refused() -> Iterator[None]:
    """Answers an upload that the disk has no room for.

    Raises:
        ResourceExhausted: DISK_FULL.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceExhausted(
            "no space is left for uploads on the server; free some and try again",
            reason="DISK_FULL",
        ) from error
