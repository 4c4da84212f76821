"""Zip archives: the table of contents, and unpacking one entry."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from services.preprocess.domain import Reason
from services.preprocess.entries import Entry, Limits, Listing, Storage, limit, refuse

_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000
_UTF8_FLAG = 0x800
_END_RECORD = struct.Struct("<4s4H2LH")
_END64_RECORD = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CHUNK_BYTES = 1 << 16
_STORAGES = {
    zipfile.ZIP_STORED: Storage.ZIP_STORED,
    zipfile.ZIP_DEFLATED: Storage.ZIP_DEFLATED,
}


def list_entries(path: Path, limits: Limits) -> dict[str, Entry]:
    """Reads and checks the table of contents.

    Raises:
        ArchiveError: As `archive.list_entries`.
    """
    _check_directory_size(path, limits)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
        raise refuse(
            "archive", Reason.CORRUPT_ARCHIVE, f"not a readable zip ({error}); pack it again"
        ) from error
    listing = Listing(limits)
    for info in infos:
        name = _name_of(info)
        unsupported = _why_unsupported(info)
        entry = None
        if not unsupported and not name.endswith("/"):
            entry = Entry(
                name,
                info.header_offset,
                info.compress_size,
                info.file_size,
                info.CRC,
                _STORAGES[info.compress_type],
            )
        listing.add(name, entry, unsupported)
    return listing.finish(path.stat().st_size)


def unpack(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """Yields the unpacked bytes of an entry, in pieces of about a megabyte at most.

    Raises:
        struct.error: It is not at the declared place, or the archive ends too early.
        zlib.error: It cannot be inflated.
    """
    if entry.offset < 0:  # the beginning of the file is missing
        raise struct.error("no entry at the declared place")
    file.seek(entry.offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if header[0] != b"PK\x03\x04":
        raise struct.error("no entry at the declared place")
    file.seek(entry.offset + _LOCAL_HEADER.size + header[-2] + header[-1])
    left = entry.packed_bytes
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    while left > 0:
        packed = file.read(min(left, _CHUNK_BYTES))
        if not packed:
            raise struct.error("the archive ends too early")
        left -= len(packed)
        if entry.storage is Storage.ZIP_STORED:
            yield packed
            continue
        while packed:
            yield inflate.decompress(packed, 16 * _CHUNK_BYTES)
            packed = inflate.unconsumed_tail
    if entry.storage is Storage.ZIP_DEFLATED and not inflate.eof:
        raise zlib.error("the compressed data ends too early")


def _why_unsupported(info: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.flag_bits & _ENCRYPTED_FLAGS:
        return "is encrypted; pack it without a password"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or device; pack the file itself"
    if info.compress_type not in _STORAGES:
        return f"uses compression method {info.compress_type}; use deflate or store"
    return ""


def _name_of(info: zipfile.ZipInfo) -> str:
    """Returns the name as the packer wrote it: `info.filename` is already cut at a NUL."""
    name = info.orig_filename
    if info.flag_bits & _UTF8_FLAG:
        return name
    try:  # many packers write UTF-8 without saying so
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _check_directory_size(path: Path, limits: Limits) -> None:
    """Refuses a huge table of contents before zipfile makes objects of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = max(0, size - _END_RECORD.size - 65_535)
        file.seek(start)
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END_RECORD.size:
            raise refuse(
                "archive",
                Reason.CORRUPT_ARCHIVE,
                "no zip, tar or tar.gz, or a truncated zip: its table of contents is missing;"
                " upload it again",
            )
        *_, num_entries, directory_bytes, _, _ = _END_RECORD.unpack_from(tail, at)
        if at >= _END64_LOCATOR.size:
            locator = _END64_LOCATOR.unpack_from(tail, at - _END64_LOCATOR.size)
            if locator[0] == b"PK\x06\x07":
                file.seek(min(locator[2], size))
                record = file.read(_END64_RECORD.size)
                if len(record) == _END64_RECORD.size and record[:4] == b"PK\x06\x06":
                    *_, num_entries, directory_bytes, _ = _END64_RECORD.unpack(record)
    if num_entries > limits.entries or directory_bytes > limits.directory_bytes:
        raise limit(f"holds {num_entries} entries, more than {limits.entries}; split it")
