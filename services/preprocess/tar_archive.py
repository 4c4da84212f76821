"""Tar archives: finding what they hold, and undoing gzip around them.

A gzip stream can only be read from its beginning, so it is unpacked once into a tar on the local
disk, in which every entry is at an offset.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from services.preprocess.domain import Reason
from services.preprocess.entries import (
    ArchiveError,
    Entry,
    Limits,
    Listing,
    Storage,
    check_total,
    limit,
    refuse,
)

_CHUNK_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MAX_EXTENSION_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_UNSUPPORTED = {
    tarfile.LNKTYPE: "is a hard link; pack the file itself (tar --hard-dereference)",
    tarfile.SYMTYPE: "is a link; pack the file itself (tar --dereference)",
    tarfile.CHRTYPE: "is a device; leave it out",
    tarfile.BLKTYPE: "is a device; leave it out",
    tarfile.FIFOTYPE: "is a pipe; leave it out",
    tarfile.GNUTYPE_SPARSE: "is a sparse file; pack it without --sparse",
}
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_GLOBAL_HEADER, _EXTENDED_HEADERS = tarfile.XGLTYPE, (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


def is_tar(beginning: bytes) -> bool:
    """Says whether a file that begins so is a tar: its first header is right, or it is empty."""
    if beginning[:_BLOCK] == _ZEROS:
        return True
    try:
        tarfile.TarInfo.frombuf(beginning[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def list_entries(path: Path, limits: Limits, packed_bytes: int | None = None) -> dict[str, Entry]:
    """Finds everything in a tar, reading only its headers.

    Args:
        path: The tar.
        limits: How much it may hold.
        packed_bytes: Size of the file it was unpacked from, if it was.

    Raises:
        ArchiveError: As `archive.list_entries`.
    """
    size_bytes = path.stat().st_size
    file = os.open(path, os.O_RDONLY)
    try:
        listing = _Scan(file, size_bytes, limits).run()
    except (tarfile.HeaderError, ValueError) as error:
        raise refuse(
            "archive", Reason.CORRUPT_ARCHIVE, f"not a readable tar ({error}); pack it again"
        ) from error
    finally:
        os.close(file)
    return listing.finish(size_bytes if packed_bytes is None else packed_bytes)


def gunzip(path: Path, target: Path, limits: Limits) -> None:
    """Unpacks a gzip file, counting what really comes out.

    Raises:
        ArchiveError: ARCHIVE_LIMIT; CORRUPT_ARCHIVE: it is cut off or damaged.
        OSError: The disk is full.
    """
    packed_bytes, num_bytes = path.stat().st_size, 0
    with path.open("rb") as source, target.open("xb") as out:
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
        packed = source.read(_CHUNK_BYTES)
        try:
            while packed:
                data = inflate.decompress(packed, _CHUNK_BYTES)
                num_bytes += len(data)
                check_total(num_bytes, packed_bytes, limits)
                out.write(data)
                if not inflate.eof:
                    packed = inflate.unconsumed_tail or source.read(_CHUNK_BYTES)
                    continue
                # Another member may follow, or the zeros that fill up a tape.
                packed = (inflate.unused_data or source.read(_CHUNK_BYTES)).lstrip(b"\0")
                while len(packed) < len(_GZIP_MAGIC) and (more := source.read(_CHUNK_BYTES)):
                    packed = (packed + more).lstrip(b"\0")
                if packed:
                    inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
        except zlib.error as error:
            raise _corrupt(f"the gzip is damaged ({error})") from error
        if not inflate.eof:
            raise _corrupt("the gzip ends too early")


@dataclass(slots=True)
class _Extension:
    """What headers before an entry's own say of it."""

    name: str | None = None
    size_bytes: int | None = None
    is_sparse: bool = False


class _Scan:
    """Walks from header to header."""

    def __init__(self, file: int, size_bytes: int, limits: Limits) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._limits = limits
        self._listing = Listing(limits)
        self._extension_bytes = 0

    def run(self) -> Listing:
        """Finds all entries."""
        position, extension = 0, _Extension()
        while (block := os.pread(self._file, _BLOCK, position)) != _ZEROS:
            if len(block) < _BLOCK:
                raise _corrupt("the tar ends without its end mark: it was cut off")
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            position += _BLOCK
            if info.type in (*_EXTENDED_HEADERS, _GLOBAL_HEADER, *tarfile.GNU_TYPES[:2]):
                data = self._read_extension(position, info.size)
                self._extend(extension, info.type, data)
                position += _padded(info.size)
                continue
            size_bytes = info.size if extension.size_bytes is None else extension.size_bytes
            has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
            if size_bytes < 0 or (has_data and position + size_bytes > self._size_bytes):
                raise _corrupt(f"the tar is cut off in {info.name!r}")
            self._add(info, extension, position, size_bytes)
            position += _padded(size_bytes) if has_data else 0
            extension = _Extension()
        self._check_rest(position)
        return self._listing

    def _add(
        self, info: tarfile.TarInfo, extension: _Extension, offset: int, size_bytes: int
    ) -> None:
        name = info.name if extension.name is None else extension.name
        while name.startswith("./"):  # as `tar -C folder .` writes them
            name = name[2:].lstrip("/")
        if info.isdir():
            if name.rstrip("/") not in ("", "."):
                self._listing.add(f"{name.rstrip('/')}/", None)
            return
        unsupported = _UNSUPPORTED.get(info.type, "")
        if extension.is_sparse:
            unsupported = _UNSUPPORTED[tarfile.GNUTYPE_SPARSE]
        elif info.type not in _FILES and not unsupported:
            unsupported = f"is of the unknown kind {info.type!r}; pack plain files"
        entry = Entry(name, offset, size_bytes, size_bytes, None, Storage.PLAIN)
        self._listing.add(name, entry, unsupported)

    def _read_extension(self, position: int, size_bytes: int) -> bytes:
        self._extension_bytes += _BLOCK + max(size_bytes, 0)
        if (
            size_bytes > _MAX_EXTENSION_BYTES
            or self._extension_bytes > self._limits.directory_bytes
        ):
            raise limit("its headers are too large; pack it again without extended attributes")
        data = os.pread(self._file, size_bytes, position) if size_bytes > 0 else b""
        if len(data) != size_bytes:
            raise _corrupt("the tar is cut off in a header")
        return data

    def _extend(self, extension: _Extension, kind: bytes, data: bytes) -> None:
        if kind == tarfile.GNUTYPE_LONGNAME:
            extension.name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif kind in _EXTENDED_HEADERS:
            for key, value in _records(data):
                if key == b"path":
                    extension.name = value.decode("utf-8", "surrogateescape")
                elif key == b"size":
                    extension.size_bytes = _number(value)
                elif key.startswith(b"GNU.sparse."):
                    extension.is_sparse = True

    def _check_rest(self, position: int) -> None:
        """Refuses data behind the end mark, such as of a second tar, which would get lost."""
        while rest := os.pread(self._file, _CHUNK_BYTES, position):
            if rest.strip(b"\0"):
                raise _corrupt("it holds something behind its end mark; pack everything at once")
            position += len(rest)


def _records(data: bytes) -> list[tuple[bytes, bytes]]:
    """Reads the "length key=value" records of a pax header.

    Raises:
        ValueError: They are malformed.
    """
    records: list[tuple[bytes, bytes]] = []
    while data.strip(b"\0"):
        length, space, _ = data[:20].partition(b" ")
        size_bytes = _number(length)
        record = data[len(length) + len(space) : size_bytes]
        key, equals, value = record.partition(b"=")
        if size_bytes > len(data) or not (space and key and equals and value.endswith(b"\n")):
            raise ValueError("malformed pax header")
        records.append((key, value[:-1]))
        data = data[size_bytes:]
    return records


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise ValueError("malformed pax header")
    return int(text)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK) * _BLOCK


def _corrupt(description: str) -> ArchiveError:
    return refuse("archive", Reason.CORRUPT_ARCHIVE, f"{description}; pack or upload it again")
