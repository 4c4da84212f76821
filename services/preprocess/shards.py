"""Tar shards: plain tar files whose members are found by offset, with the same bytes every time."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Self

_HEADER_BYTES = 512


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
