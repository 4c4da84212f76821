"""A folder read as if it were a tar archive, without a copy on the disk.

The same files give the same bytes, whenever and wherever they are read: what is not content (times,
owners, modes) is left out. So an upload that was broken off can go on with them.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from detflow.errors import InvalidArgument

_END = bytes(2 * tarfile.BLOCKSIZE)


class FolderTar(io.RawIOBase):
    """The files under a folder, hidden ones left out, sorted by path; linked folders are followed.

    Args:
        folder: The folder.

    Raises:
        InvalidArgument: EMPTY_DATASET: it holds no files; BAD_NAME: a name is no text;
            NO_SUCH_FILE: a file cannot be read, FILE_CHANGED: it has another size than before;
            both also while it is read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._starts: list[int] = []
        self._position = self.size_bytes = 0
        self._open: tuple[int, IO[bytes]] | None = None
        for path in _files(folder):
            self._names.append(_name_of(path, folder))
            with _readable(path):
                self._sizes.append(path.stat().st_size)
            self._starts.append(self.size_bytes)
            self.size_bytes += len(self._header(len(self._names) - 1)) + _padded(self._sizes[-1])
        if not self._names:
            raise InvalidArgument(f"{folder} holds no files", reason="EMPTY_DATASET")
        self.size_bytes += len(_END)

    def readable(self) -> bool:
        """Says that it can be read."""
        return True

    def seekable(self) -> bool:
        """Says that its position can be set."""
        return True

    def tell(self) -> int:
        """Returns the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Reads some bytes."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the file that is being read."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
        super().close()

    def _read(self, size_bytes: int) -> bytes:
        tail = self.size_bytes - len(_END)
        if self._position >= tail:
            return _END[self._position - tail :][:size_bytes]
        index = bisect.bisect_right(self._starts, self._position) - 1
        inside = self._position - self._starts[index]
        header = self._header(index)
        if inside < len(header):
            return header[inside:][:size_bytes]
        inside -= len(header)
        left = self._sizes[index] - inside
        if left <= 0:
            return bytes(min(_padded(self._sizes[index]) - inside, size_bytes))
        data = self._content(index, inside, min(left, size_bytes))
        if not data:
            raise self._changed(index)
        return data

    def _content(self, index: int, start: int, size_bytes: int) -> bytes:
        path = self._folder / self._names[index]
        with _readable(path):
            if self._open is None or self._open[0] != index:
                if self._open is not None:
                    self._open[1].close()
                self._open = (index, path.open("rb"))
                if os.fstat(self._open[1].fileno()).st_size != self._sizes[index]:
                    raise self._changed(index)
            self._open[1].seek(start)
            return self._open[1].read(size_bytes)

    def _header(self, index: int) -> bytes:
        info = tarfile.TarInfo(self._names[index])
        info.size = self._sizes[index]
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")

    def _changed(self, index: int) -> InvalidArgument:
        return InvalidArgument(
            f"{self._folder / self._names[index]} changed while it was read; try again",
            reason="FILE_CHANGED",
        )


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files under a folder. Linked folders are followed, each once."""
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgument(
            f"cannot read {path} ({error.strerror})", reason="NO_SUCH_FILE"
        ) from error


def _name_of(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"the name of {os.fsencode(path)!r} is not UTF-8; rename it", reason="BAD_NAME"
        ) from error
    return name


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
