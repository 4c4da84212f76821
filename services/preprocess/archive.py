"""Reading archives from strangers: zip, tar and tar.gz, told apart by their content.

What they hold is listed and checked before anything is unpacked: names, kinds of entries, counts
and declared sizes. Entries are then read by `read_entry`, which counts the real bytes and trusts no
declared size. Nothing is ever written under a name from the archive. An `Entry` is picklable, so a
pool of processes reads one archive side by side.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from services.preprocess import tar_archive, zip_archive
from services.preprocess.domain import InvalidData, Reason
from services.preprocess.entries import (
    ArchiveError,
    Entry,
    Limits,
    Storage,
    check_name,
    check_total,
    refuse,
)

__all__ = [
    "ArchiveError",
    "Entry",
    "Limits",
    "check_name",
    "check_total",
    "list_entries",
    "open_archive",
    "read_entry",
]

_CHUNK_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
_OTHERS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"\x1f\x9d": "compress",
    b"\x04\x22\x4d\x18": "lz4",
}


def open_archive(path: Path, folder: Path, limits: Limits) -> tuple[Path, dict[str, Entry]]:
    """Makes an archive ready to be read at random, and lists it.

    Args:
        path: The archive; removed if it had to be unpacked.
        folder: Where a tar.gz is unpacked to a tar.
        limits: How much it may hold.

    Returns:
        The archive to read, and its files by path, sorted by path.

    Raises:
        ArchiveError: As `list_entries`.
        OSError: The disk is full.
    """
    if _beginning(path)[: len(_GZIP)] != _GZIP:
        return path, list_entries(path, limits)
    packed_bytes = path.stat().st_size
    unpacked = folder / f"{path.name}.tar"
    tar_archive.gunzip(path, unpacked, limits)
    if not tar_archive.is_tar(_beginning(unpacked)):
        raise refuse(
            "archive", Reason.CORRUPT_ARCHIVE, "the gzip holds no tar; pack it as zip or tar.gz"
        )
    path.unlink()
    return unpacked, tar_archive.list_entries(unpacked, limits, packed_bytes)


def list_entries(path: Path, limits: Limits) -> dict[str, Entry]:
    """Lists and checks what is in a zip or a tar.

    Folders and the litter of desktop systems (__MACOSX, .DS_Store, Thumbs.db) are left out.

    Args:
        path: The archive.
        limits: How much it may hold.

    Returns:
        The files by their path, sorted by path.

    Raises:
        ArchiveError: CORRUPT_ARCHIVE, ARCHIVE_LIMIT, EMPTY_DATASET, UNSAFE_PATH,
            UNSUPPORTED_ENTRY, BAD_NAME or DUPLICATE_NAME.
    """
    beginning = _beginning(path)
    if tar_archive.is_tar(beginning):
        return tar_archive.list_entries(path, limits)
    for magic, name in _OTHERS.items():
        if beginning.startswith(magic):
            raise refuse(
                "archive",
                Reason.UNSUPPORTED_ENTRY,
                f"archives of {name} are not read; pack it as zip, tar or tar.gz",
            )
    return zip_archive.list_entries(path, limits)


def read_entry(file: BinaryIO, entry: Entry, limits: Limits) -> bytes:
    """Unpacks one entry, counting what really comes out.

    Args:
        file: The archive, open for reading; its position is changed.
        entry: What to unpack.
        limits: How much it may hold.

    Raises:
        InvalidData: ARCHIVE_LIMIT if more comes out than declared or allowed, CORRUPT_ARCHIVE if
            it cannot be unpacked or its checksum is wrong.
    """
    out = bytearray()
    allowed = min(entry.size_bytes, limits.entry_bytes)
    try:
        for chunk in _unpack(file, entry):
            out += chunk
            if len(out) > allowed:
                raise InvalidData(
                    entry.path,
                    Reason.ARCHIVE_LIMIT,
                    f"unpacks to more than the {allowed} bytes that are declared or allowed;"
                    " pack it again",
                )
    except (zlib.error, struct.error) as error:
        raise InvalidData(
            entry.path, Reason.CORRUPT_ARCHIVE, f"cannot be unpacked ({error}); pack it again"
        ) from error
    if len(out) != entry.size_bytes or entry.crc not in (None, zlib.crc32(out)):
        raise InvalidData(
            entry.path, Reason.CORRUPT_ARCHIVE, "has a wrong checksum or length; pack it again"
        )
    return bytes(out)


def _unpack(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    if entry.storage is not Storage.PLAIN:
        yield from zip_archive.unpack(file, entry)
        return
    file.seek(entry.offset)
    left = entry.size_bytes
    while left > 0 and (data := file.read(min(left, _CHUNK_BYTES))):
        left -= len(data)
        yield data


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)
