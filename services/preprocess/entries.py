"""What every kind of archive is checked for: names, counts and sizes of its entries."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from enum import StrEnum

from services.preprocess.domain import Problem, ProblemList, Reason

_NESTED = (".zip", ".tar", ".tgz", ".tar.gz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".jar")
_JUNK_NAMES = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
_MAX_NAME_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much an archive may hold.

    Attributes:
        entries: Files and folders.
        directory_bytes: Size of a zip's table of contents, or of all long names of a tar.
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


class Storage(StrEnum):
    """How the bytes of an entry are in the archive."""

    PLAIN = "PLAIN"  # as they are, at the offset
    ZIP_STORED = "ZIP_STORED"  # as they are, behind a header of a zip
    ZIP_DEFLATED = "ZIP_DEFLATED"  # deflated, behind a header of a zip


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in an archive, as its table of contents declares it.

    Attributes:
        path: Its name.
        offset: Where it begins in the archive.
        packed_bytes: Its size in the archive.
        size_bytes: Its size.
        crc: CRC-32 of its bytes; None where the archive has none.
        storage: How it is stored.
    """

    path: str
    offset: int
    packed_bytes: int
    size_bytes: int
    crc: int | None
    storage: Storage


class ArchiveError(Exception):
    """The archive is refused as a whole; carries every problem found."""

    def __init__(self, problems: ProblemList) -> None:
        super().__init__(problems.first()[0].description)
        self.problems = problems


def refuse(where: str, reason: Reason, description: str) -> ArchiveError:
    """Makes the error with a single problem."""
    problems = ProblemList()
    problems.add([Problem(where, reason, description)])
    return ArchiveError(problems)


def limit(description: str, where: str = "archive") -> ArchiveError:
    """Makes the error of an archive that holds too much."""
    return refuse(where, Reason.ARCHIVE_LIMIT, description)


class Listing:
    """Collects the files of an archive and everything that is wrong with its names.

    Args:
        limits: How much it may hold.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[str, Entry] = {}
        self._problems = ProblemList()
        self._seen: dict[str, str] = {}
        self._num_entries = 0

    def add(self, name: str, entry: Entry | None, unsupported: str = "") -> None:
        """Adds a file, or a folder, whose name ends in a slash.

        Args:
            name: Its name.
            entry: The file; None for a folder.
            unsupported: Why an entry of this kind is not read; empty if it is.

        Raises:
            ArchiveError: ARCHIVE_LIMIT: there are too many.
        """
        self._num_entries += 1
        if self._num_entries > self._limits.entries:
            raise limit(f"holds more than {self._limits.entries} entries; split it")
        if not unsupported and name.lower().endswith(_NESTED):
            unsupported = "is an archive inside the archive; unpack it first"
        problem = check_name(name)
        if problem is None and unsupported:
            problem = Problem(name, Reason.UNSUPPORTED_ENTRY, unsupported)
        problem = problem or self._check_unique(name)
        if problem is not None:
            self._problems.add([problem])
        elif entry is not None and not _is_junk(name):
            self._entries[name] = entry

    def finish(self, archive_bytes: int) -> dict[str, Entry]:
        """Returns the files by their path, sorted by path.

        Args:
            archive_bytes: Size of the archive.

        Raises:
            ArchiveError: Everything that is wrong; EMPTY_DATASET, ARCHIVE_LIMIT.
        """
        if self._problems.total:
            raise ArchiveError(self._problems)
        if not self._entries:
            raise refuse(
                "archive", Reason.EMPTY_DATASET, "the archive holds no files; pack your images"
            )
        for entry in self._entries.values():
            if entry.size_bytes > self._limits.entry_bytes:
                raise limit(
                    f"declares {entry.size_bytes} bytes, more than {self._limits.entry_bytes}",
                    entry.path,
                )
        total = sum(entry.size_bytes for entry in self._entries.values())
        check_total(total, archive_bytes, self._limits)
        return dict(sorted(self._entries.items()))

    def _check_unique(self, name: str) -> Problem | None:
        key = unicodedata.normalize("NFC", name.rstrip("/")).casefold()
        other = self._seen.get(key)
        self._seen[key] = name
        if other is None or (name.endswith("/") and other == name):
            return None
        return Problem(
            name,
            Reason.DUPLICATE_NAME,
            f"same name as {other!r} when case and Unicode form are ignored; rename one",
        )


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


def check_total(unpacked_bytes: int, archive_bytes: int, limits: Limits) -> None:
    """Checks the unpacked size so far against the limits; called with real sizes while unpacking.

    Raises:
        ArchiveError: ARCHIVE_LIMIT.
    """
    if unpacked_bytes > limits.total_bytes:
        raise limit(f"unpacks to more than {limits.total_bytes} bytes; split it")
    if unpacked_bytes > max(limits.free_bytes, limits.ratio * archive_bytes):
        raise limit(
            f"unpacks to more than {limits.ratio} times its size; pack images as they are, not"
            " zeros"
        )


def _is_junk(name: str) -> bool:
    last = name.rsplit("/", 1)[-1].lower()
    return last in _JUNK_NAMES or last.startswith("._") or name.startswith("__MACOSX/")
