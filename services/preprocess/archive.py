"""Reading zip archives from strangers.

The central directory is checked before anything is unpacked: names, kinds of entries, counts and
declared sizes. Entries are then decompressed by `read_entry`, which counts the real bytes and
trusts no declared size. Nothing is ever written under a name from the archive. An `Entry` is
picklable, so a pool of processes reads one archive side by side.
"""

from __future__ import annotations

import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.preprocess.domain import InvalidData, Problem, ProblemList, Reason

_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000
_UTF8_FLAG = 0x800
_END_RECORD = struct.Struct("<4s4H2LH")
_END64_RECORD = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CHUNK_BYTES = 1 << 16
_NESTED = (".zip", ".tar", ".tgz", ".tar.gz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".jar")
_JUNK_NAMES = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
_MAX_NAME_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much an archive may hold.

    Attributes:
        entries: Files and folders.
        directory_bytes: Size of the zip's table of contents.
        total_bytes: Unpacked size of everything.
        entry_bytes: Unpacked size of one file.
        ratio: Unpacked size per packed byte, once `free_bytes` are exceeded.
        free_bytes: Unpacked size up to which the ratio does not matter.
    """

    entries: int = 500_000
    directory_bytes: int = 128 << 20
    total_bytes: int = 1 << 40
    entry_bytes: int = 512 << 20
    ratio: int = 100
    free_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in an archive, as its table of contents declares it."""

    path: str
    offset: int
    packed_bytes: int
    size_bytes: int
    crc: int
    deflated: bool


class ArchiveError(Exception):
    """The archive is refused as a whole; carries every problem found."""

    def __init__(self, problems: ProblemList) -> None:
        super().__init__(problems.first()[0].description)
        self.problems = problems


def _refuse(where: str, reason: Reason, description: str) -> ArchiveError:
    problems = ProblemList()
    problems.add([Problem(where, reason, description)])
    return ArchiveError(problems)


def list_entries(path: Path, limits: Limits) -> dict[str, Entry]:
    """Reads and checks the table of contents of a zip archive.

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
    _check_directory_size(path, limits)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
        raise _refuse(
            "archive", Reason.CORRUPT_ARCHIVE, f"not a readable zip ({error}); pack it again"
        ) from error
    if len(infos) > limits.entries:
        raise _limit(f"holds {len(infos)} entries, more than {limits.entries}; split it")
    problems = ProblemList()
    entries: dict[str, Entry] = {}
    seen: dict[str, str] = {}
    for info in infos:
        name = _name_of(info)
        problem = check_name(name) or _check_kind(name, info)
        if problem is None:
            key = unicodedata.normalize("NFC", name.rstrip("/")).casefold()
            if key in seen and not (name.endswith("/") and seen[key] == name):
                problem = Problem(
                    name,
                    Reason.DUPLICATE_NAME,
                    f"same name as {seen[key]!r} when case and Unicode form are ignored; rename"
                    " one",
                )
            seen[key] = name
        if problem is not None:
            problems.add([problem])
        elif not name.endswith("/") and not _is_junk(name):
            entries[name] = Entry(
                name,
                info.header_offset,
                info.compress_size,
                info.file_size,
                info.CRC,
                info.compress_type == zipfile.ZIP_DEFLATED,
            )
    if problems.total:
        raise ArchiveError(problems)
    if not entries:
        raise _refuse(
            "archive", Reason.EMPTY_DATASET, "the archive holds no files; pack your images"
        )
    _check_declared_sizes(entries, path.stat().st_size, limits)
    return dict(sorted(entries.items()))


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
    if len(out) != entry.size_bytes or zlib.crc32(out) != entry.crc:
        raise InvalidData(
            entry.path, Reason.CORRUPT_ARCHIVE, "has a wrong checksum or length; pack it again"
        )
    return bytes(out)


def check_name(name: str) -> Problem | None:
    """Says what is wrong with an entry's name, if anything; names are never repaired."""
    if not name.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        return Problem(
            name.encode("unicode_escape").decode(),
            Reason.BAD_NAME,
            "the name holds a control character; rename the file",
        )
    parts = name.rstrip("/").split("/")
    if name.startswith("/") or "\\" in name or ".." in parts or name[1:2] == ":":
        return Problem(
            name,
            Reason.UNSAFE_PATH,
            "absolute paths, drive letters, backslashes and '..' are not allowed; pack relative"
            " paths",
        )
    if "" in parts or "." in parts or len(name.encode()) > _MAX_NAME_BYTES:
        return Problem(
            name[:200],
            Reason.BAD_NAME,
            f"empty parts, '.' and names above {_MAX_NAME_BYTES} bytes are not allowed; rename"
            " the file",
        )
    return None


def _check_kind(name: str, info: zipfile.ZipInfo) -> Problem | None:
    what = ""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.flag_bits & _ENCRYPTED_FLAGS:
        what = "is encrypted; pack it without a password"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "is a link or device; pack the file itself"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        what = f"uses compression method {info.compress_type}; use deflate or store"
    elif name.lower().endswith(_NESTED):
        what = "is an archive inside the archive; unpack it first"
    return Problem(name, Reason.UNSUPPORTED_ENTRY, what) if what else None


def _check_declared_sizes(entries: Mapping[str, Entry], archive_bytes: int, limits: Limits) -> None:
    for entry in entries.values():
        if entry.size_bytes > limits.entry_bytes:
            raise _limit(
                f"declares {entry.size_bytes} bytes, more than {limits.entry_bytes}", entry.path
            )
    check_total(sum(entry.size_bytes for entry in entries.values()), archive_bytes, limits)


def check_total(unpacked_bytes: int, archive_bytes: int, limits: Limits) -> None:
    """Checks the unpacked size so far against the limits; called with real sizes while unpacking.

    Raises:
        ArchiveError: ARCHIVE_LIMIT.
    """
    if unpacked_bytes > limits.total_bytes:
        raise _limit(f"unpacks to more than {limits.total_bytes} bytes; split it")
    if unpacked_bytes > max(limits.free_bytes, limits.ratio * archive_bytes):
        raise _limit(
            f"unpacks to more than {limits.ratio} times its size; pack images as they are, not"
            " zeros"
        )


def _limit(description: str, where: str = "archive") -> ArchiveError:
    return _refuse(where, Reason.ARCHIVE_LIMIT, description)


def _name_of(info: zipfile.ZipInfo) -> str:
    """Returns the name as the packer wrote it: `info.filename` is already cut at a NUL."""
    name = info.orig_filename
    if info.flag_bits & _UTF8_FLAG:
        return name
    try:  # many packers write UTF-8 without saying so
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _is_junk(name: str) -> bool:
    last = name.rsplit("/", 1)[-1].lower()
    return last in _JUNK_NAMES or last.startswith("._") or name.startswith("__MACOSX/")


def _check_directory_size(path: Path, limits: Limits) -> None:
    """Refuses a huge table of contents before zipfile makes objects of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = max(0, size - _END_RECORD.size - 65_535)
        file.seek(start)
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END_RECORD.size:
            raise _refuse(
                "archive",
                Reason.CORRUPT_ARCHIVE,
                "not a zip, or truncated: its table of contents is missing; upload it again",
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
        raise _limit(f"holds {num_entries} entries, more than {limits.entries}; split it")


def _unpack(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
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
        if not entry.deflated:
            yield packed
            continue
        while packed:
            yield inflate.decompress(packed, 16 * _CHUNK_BYTES)
            packed = inflate.unconsumed_tail
    if entry.deflated and not inflate.eof:
        raise zlib.error("the compressed data ends too early")
