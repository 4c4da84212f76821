"""Tar shards: plain tar files whose members are found by offset, with the same bytes every time."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

MAX_SOURCES = 512
MAX_SOURCE_BYTES = 256 << 20
"""Of a shard's sources together, or of one; re-encoded they stay below 512 MiB in practice."""

_HEADER_BYTES = 512


def divide(source_bytes: Sequence[int], *, num_shards: int, min_sources: int) -> list[range]:
    """Divides sources into shards, in order.

    Args:
        source_bytes: What each source brings into its shard.
        num_shards: How many are wanted, so that processes have work and progress moves.
        min_sources: Sources worth a shard of their own.

    Returns:
        The positions of each shard's sources.
    """
    limit = min(max(-(-len(source_bytes) // num_shards), min_sources), MAX_SOURCES)
    shards: list[range] = []
    first, total_bytes = 0, 0
    for i, size in enumerate(source_bytes):
        if i > first and (i - first == limit or total_bytes + size > MAX_SOURCE_BYTES):
            shards.append(range(first, i))
            first, total_bytes = i, 0
        total_bytes += size
    if source_bytes:
        shards.append(range(first, len(source_bytes)))
    return shards


class ShardWriter:
    """Writes a tar file without times, owners or anything else that varies.

    Use it as a context manager; the file is complete at its end.
    """

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tar.close()

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns where its bytes begin in the file."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        start = self._tar.offset
        self._tar.addfile(info, io.BytesIO(data))
        return start + _HEADER_BYTES
