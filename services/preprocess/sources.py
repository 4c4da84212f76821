"""Archives and folders in object stores of the user, fetched with the service's own credentials.

So that those don't become everybody's, only what the operator allows is read, and never detflow's
own store. A URL is `scheme://bucket/path`, its path taken as it stands: what could make two
spellings of one place (percent-encoding, `..`, a query) is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import (
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from detflow.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from detflow.store import open_url
from services.preprocess.archive import Entry, Limits, open_archive
from services.preprocess.assembly import PIECE_BYTES, Piece, assemble
from services.preprocess.domain import Reason
from services.preprocess.entries import Listing, Storage
from services.preprocess.progress import ProgressReporter

_URL = re.compile(r"(?i)(s3|gs|az|file)://([a-z0-9][a-z0-9._-]*)?(/[^?#%\\\x00-\x1f\x7f]*)?")
_ATTEMPTS = 3
_LISTED_AT_ONCE = 1000
_QUERY = re.compile(r"\?\S*")


@dataclass(frozen=True, slots=True)
class Source:
    """A place in an object store.

    Attributes:
        scheme: s3, gs, az or file.
        bucket: Bucket or container, in lower case; empty for a file.
        path: Key, or for a folder what its keys begin with; without a slash at either end.
        is_folder: Whether it is a folder of objects; else it is one, an archive.
    """

    scheme: str
    bucket: str
    path: str
    is_folder: bool

    @property
    def url(self) -> str:
        """The only spelling of it."""
        slash = "/" if self.is_folder and self.path else ""
        return f"{self.root}{self.path}{slash}"

    @property
    def root(self) -> str:
        """The bucket."""
        return f"{self.scheme}://{self.bucket}/"

    def holds(self, other: Source) -> bool:
        """Whether the other is this one or lies under it."""
        if (self.scheme, self.bucket) != (other.scheme, other.bucket):
            return False
        return f"{_real(other)}/".startswith(f"{_real(self)}/".lstrip("/"))


@dataclass(frozen=True, slots=True)
class _Object:
    """An object, and where it goes in the file that is put together."""

    key: str
    etag: str | None
    size_bytes: int
    start: int


def parse_source(url: str) -> Source:
    """Reads a URL.

    Raises:
        ValueError: It has another form than scheme://bucket/path.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("no scheme://bucket/path")
    scheme, bucket, path = match[1].lower(), (match[2] or "").lower(), match[3] or "/"
    parts = path.strip("/").split("/") if path.strip("/") else []
    if (scheme == "file") == bool(bucket) or any(part in ("", ".", "..") for part in parts):
        raise ValueError("no scheme://bucket/path")
    return Source(scheme, bucket, "/".join(parts), path.endswith("/"))


class Sources:
    """What may be imported from elsewhere, and fetching it.

    Args:
        allowed: URLs under which everything may be imported, separated by commas.
        store_url: detflow's own store, of which nothing may be.
        limits: How much an archive may hold.
        max_bytes: Largest archive or folder.

    Raises:
        InvalidArgument: BAD_SETTING: an allowed URL cannot be read.
    """

    def __init__(self, *, allowed: str, store_url: str, limits: Limits, max_bytes: int) -> None:
        self._limits = limits
        self._max_bytes = max_bytes
        urls = [url.strip() for url in allowed.split(",") if url.strip()]
        self._allowed = [_read_setting("DETFLOW_IMPORT_URLS", url) for url in urls]
        self._store = _read_setting("DETFLOW_STORE_URL", store_url) if urls else None

    def check(self, url: str) -> Source:
        """Reads the URL of a request.

        Raises:
            InvalidArgument: BAD_SOURCE_URL.
            FailedPrecondition: SOURCE_NOT_ALLOWED.
        """
        try:
            source = parse_source(url)
        except ValueError as error:  # not repeated: it may hold a secret
            raise InvalidArgument(
                "source_url must be like s3://bucket/archive.zip or s3://bucket/folder/, with s3,"
                " gs, az or file, the path as it is: no query, credentials, percent-encoding or"
                " '..'",
                reason="BAD_SOURCE_URL",
            ) from error
        self._check_allowed(source)
        return source

    async def fetch(
        self, url: str, folder: Path, progress: ProgressReporter
    ) -> tuple[Path, dict[str, Entry]]:
        """Brings an archive, or the objects of a folder in one file, to the local disk.

        Args:
            url: Where it is; checked again, as the settings may have changed.
            folder: Where it goes.
            progress: Told in stage "download", with bytes.

        Returns:
            The file, and what is in it.

        Raises:
            FailedPrecondition: SOURCE_NOT_ALLOWED, SOURCE_DENIED, SOURCE_UNAVAILABLE;
                SOURCE_CHANGED: it changed while it was read.
            NotFound: SOURCE_NOT_FOUND.
            ResourceExhausted: ARCHIVE_LIMIT, DISK_FULL.
            ArchiveError: What is wrong with the archive or the names of the objects.
        """
        source = self.check(url)
        path = folder / "source"
        with _told(source):
            store = await asyncio.to_thread(open_url, source.root)
            if source.is_folder:
                objects, entries = await asyncio.to_thread(self._list, store, source)
            else:
                objects, entries = [await asyncio.to_thread(_head, store, source)], {}
            num_bytes = sum(one.size_bytes for one in objects)
            self._check_room(source, num_bytes, folder)
            await assemble(path, _pieces(store, source, objects), num_bytes, progress)
        if source.is_folder:
            return path, entries
        return await asyncio.to_thread(open_archive, path, folder, self._limits)

    def _check_allowed(self, source: Source) -> None:
        if self._store is None or not any(one.holds(source) for one in self._allowed):
            raise FailedPrecondition(
                f"{source.url} is not among the places that may be imported from; whoever runs"
                " detflow can add it to DETFLOW_IMPORT_URLS",
                reason="SOURCE_NOT_ALLOWED",
            )
        if self._store.holds(source) or source.holds(self._store):
            raise FailedPrecondition(
                f"{source.url} is part of detflow's own store or holds it; copy the data to a place"
                " of its own",
                reason="SOURCE_NOT_ALLOWED",
            )

    def _list(self, store: Any, source: Source) -> tuple[list[_Object], dict[str, Entry]]:
        """Lists a folder: names are checked as those in an archive."""
        listing = Listing(self._limits)
        objects: dict[str, _Object] = {}
        start = 0
        for meta in _metas(store, source):
            name = str(meta["path"]).removeprefix(source.path).lstrip("/")
            if not name:  # the mark of the folder itself
                continue
            if source.scheme == "file":  # what a link in the folder leads to may be elsewhere
                self._check_allowed(Source("file", "", str(meta["path"]), is_folder=False))
            size_bytes = meta["size"]
            listing.add(name, Entry(name, start, size_bytes, size_bytes, None, Storage.PLAIN))
            objects[name] = _Object(meta["path"], meta["e_tag"], size_bytes, start)
            start += size_bytes
        if not objects:
            raise _not_found(source)
        entries = listing.finish(start)
        return [objects[name] for name in entries], entries

    def _check_room(self, source: Source, num_bytes: int, folder: Path) -> None:
        if num_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"{source.url} has {num_bytes} bytes, more than {self._max_bytes}; split it or"
                " raise DETFLOW_MAX_UPLOAD_BYTES",
                reason=Reason.ARCHIVE_LIMIT,
            )
        if num_bytes > shutil.disk_usage(folder).free:
            raise ResourceExhausted(
                f"no space is left on the server for the {num_bytes} bytes of {source.url}; free"
                " some and import again",
                reason="DISK_FULL",
            )


def _read_setting(name: str, url: str) -> Source:
    try:
        return parse_source(url)
    except ValueError as error:
        raise InvalidArgument(
            f"{name}: {url!r} must be like s3://bucket/folder, with s3, gs, az or file, without a"
            " query and percent-encoding, where imports from elsewhere are allowed",
            reason="BAD_SETTING",
        ) from error


def _real(source: Source) -> str:
    """The path without links, for a file; without a slash at either end."""
    if source.scheme != "file":
        return source.path
    return os.path.realpath(f"/{source.path}").strip("/")


def _metas(store: Any, source: Source) -> Iterator[Any]:
    batches: Iterable[Any] = obstore.list(store, source.path or None, chunk_size=_LISTED_AT_ONCE)
    for batch in batches:
        yield from batch


def _head(store: Any, source: Source) -> _Object:
    try:
        meta = obstore.head(store, source.path)
    except (FileNotFoundError, NotFoundError) as error:
        raise _not_found(source) from error
    return _Object(source.path, meta["e_tag"], meta["size"], 0)


async def _pieces(store: Any, source: Source, objects: Iterable[_Object]) -> AsyncIterator[Piece]:
    for one in objects:
        for at in range(0, one.size_bytes, PIECE_BYTES):
            size_bytes = min(PIECE_BYTES, one.size_bytes - at)
            fetch = functools.partial(_get, store, source, one, at, size_bytes)
            yield Piece(one.start + at, size_bytes, fetch)


async def _get(store: Any, source: Source, one: _Object, at: int, size_bytes: int) -> bytes:
    """Reads bytes of an object as it was when it was listed."""
    options: Any = {"range": (at, at + size_bytes)}
    if one.etag is not None:
        options["if_match"] = one.etag
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            result = await obstore.get_async(store, one.key, options=options)
            data = bytes(await result.bytes_async())
        except (FileNotFoundError, NotFoundError, PreconditionError) as error:
            raise _changed(source, one) from error
        except (PermissionDeniedError, UnauthenticatedError):
            raise
        except BaseError:  # such as a body that broke off
            if attempt == _ATTEMPTS:
                raise
            await asyncio.sleep(attempt)
            continue
        if len(data) != size_bytes or result.meta["size"] != one.size_bytes:
            raise _changed(source, one)
        return data
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _told(source: Source) -> Iterator[None]:
    """Turns what an object store answers into what the user of a dataset is told."""
    try:
        yield
    except BaseError as error:
        text = _QUERY.sub("", (str(error).splitlines() or [type(error).__name__])[0])[:300]
        is_denied = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
        if is_denied or " 403 " in text or " 401 " in text:
            raise FailedPrecondition(
                f"detflow may not read {source.url}: give the credentials of the preprocess service"
                f" the right to list and read it ({text})",
                reason="SOURCE_DENIED",
            ) from error
        if " 404 " in text:
            raise _not_found(source) from error
        raise FailedPrecondition(
            f"{source.url} cannot be read: {text}; check the address and import again",
            reason="SOURCE_UNAVAILABLE",
        ) from error


def _not_found(source: Source) -> NotFound:
    what = "there is nothing under" if source.is_folder else "there is no object"
    return NotFound(
        f"{what} {source.url}; check the address, a folder ends in /",
        reason="SOURCE_NOT_FOUND",
        metadata={"source_url": source.url},
    )


def _changed(source: Source, one: _Object) -> FailedPrecondition:
    return FailedPrecondition(
        f"{source.root}{one.key} changed while it was read; import again when nobody writes there",
        reason="SOURCE_CHANGED",
        metadata={"source_url": source.url},
    )
