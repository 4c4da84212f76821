"""Putting a file together on the local disk from pieces that are fetched side by side."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.preprocess.progress import ProgressReporter

PIECE_BYTES = 4 << 20
_FETCHED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a file.

    Attributes:
        start: Place of the first in the file.
        size_bytes: How many.
        fetch: Returns them.
    """

    start: int
    size_bytes: int
    fetch: Callable[[], Awaitable[bytes]]


async def assemble(
    path: Path, pieces: AsyncIterator[Piece], num_bytes: int, progress: ProgressReporter
) -> None:
    """Fetches pieces, sixteen at once, and writes each to its place in a new file.

    Args:
        path: The file.
        pieces: Taken as there is room, so there may be many.
        num_bytes: Of all pieces, for the progress.
        progress: Told in stage "download", with bytes.

    Raises:
        Exception: What `fetch` raises, or OSError; the other pieces are abandoned.
    """
    num_done, taking = 0, asyncio.Lock()
    await asyncio.to_thread(path.touch, exist_ok=False)

    async def work() -> None:
        nonlocal num_done
        while (piece := await _next(pieces, taking)) is not None:
            data = await piece.fetch()
            await asyncio.to_thread(_write, path, data, piece.start)
            num_done += piece.size_bytes
            await progress.update("download", num_done, num_bytes)

    workers = [asyncio.create_task(work()) for _ in range(_FETCHED_AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def assemble_upload(
    path: Path, store: ObjectStore, parts: Sequence[StoredObject], progress: ProgressReporter
) -> None:
    """Puts an uploaded archive together from its parts, each verified.

    Raises:
        DataLoss: A part is gone, or differs from what was recorded.
        Unavailable: The object store is away.
    """
    if len(parts) == 1:  # of any size, where it was uploaded before there were parts
        await asyncio.to_thread(store.download, parts[0], path)
        return

    async def pieces() -> AsyncIterator[Piece]:
        start = 0
        for part in parts:
            fetch = functools.partial(asyncio.to_thread, store.get, part)
            yield Piece(start, part.size_bytes, fetch)
            start += part.size_bytes

    await assemble(path, pieces(), sum(part.size_bytes for part in parts), progress)


async def _next(pieces: AsyncIterator[Piece], taking: asyncio.Lock) -> Piece | None:
    async with taking:  # an async generator has one reader at a time
        return await anext(pieces, None)


def _write(path: Path, data: bytes, start: int) -> None:
    # Opened for each piece: this thread may outlive the work, and must not write to another file.
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
