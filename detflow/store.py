"""The object store: immutable objects, each known by key, size and SHA-256."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

from detflow import faults
from detflow.errors import DataLoss, Unavailable
from detflow.v1.common_pb2 import StoredObject

if TYPE_CHECKING:  # it is a type of a stub file only
    from obstore.store import ObjectStore as Store
    from obstore.store import RetryConfig

_CHUNK_BYTES = 1 << 20
_DISK_FULL = f"(os error {errno.ENOSPC})"  # it has no class of its own
_UNFINISHED = re.compile(r"#[0-9]+$")  # how obstore names what it is writing
_BEYOND_THE_END = ("Range Not Satisfiable", "range was invalid")
_RETRIES: RetryConfig = {"max_retries": 6, "retry_timeout": datetime.timedelta(seconds=30)}


class ObjectStore:
    """Objects in a folder or a bucket. Calls block: use `asyncio.to_thread` in async code.

    It is picklable: a process pool opens its own.

    Args:
        url: file:///folder, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.
            Credentials come from the provider's own environment variables.

    Raises:
        Unavailable: By every call on a bucket: it does not answer, or not us.
        OSError: By a put into a folder: the disk is full.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._is_remote = urlsplit(url).scheme != "file"
        if not self._is_remote:
            Path(urlsplit(url).path).mkdir(parents=True, exist_ok=True)
        self._store = open_url(url)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return ObjectStore, (self.url,)

    def put(self, key: str, data: bytes | Path) -> StoredObject:
        """Stores bytes or a file under `key`, replacing what is there; it appears as a whole."""
        size_bytes, sha256 = _measure(data)
        self._begin_put(key, data)
        with self._answering():
            obstore.put(self._store, key, data)
        faults.point("store.after_put")
        return StoredObject(key=key, size_bytes=size_bytes, sha256=sha256)

    def put_if_absent(self, key: str, data: bytes | Path) -> StoredObject:
        """Stores a content-addressed object: if the key is taken, its content is the same."""
        size_bytes, sha256 = _measure(data)
        self._begin_put(key, data)
        with self._answering(), contextlib.suppress(AlreadyExistsError):
            obstore.put(self._store, key, data, mode="create")
        faults.point("store.after_put")
        return StoredObject(key=key, size_bytes=size_bytes, sha256=sha256)

    def get(self, obj: StoredObject) -> bytes:
        """Reads a whole object.

        Raises:
            DataLoss: It is gone, or its size or hash differs from what was recorded.
        """
        try:
            with self._answering():
                data = bytes(obstore.get(self._store, obj.key).bytes())
        except (FileNotFoundError, NotFoundError) as error:
            raise _lost(obj.key, "is gone") from error
        _check(obj, len(data), hashlib.sha256(data).hexdigest())
        return data

    def download(self, obj: StoredObject, path: Path) -> None:
        """Writes an object to `path`, which appears only when it is complete and verified.

        Raises:
            DataLoss: It is gone, or its size or hash differs from what was recorded.
        """
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        digest, size_bytes = hashlib.sha256(), 0
        try:
            with part.open("wb") as file, self._answering():
                for chunk in obstore.get(self._store, obj.key).stream(min_chunk_size=_CHUNK_BYTES):
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    file.write(chunk)
            _check(obj, size_bytes, digest.hexdigest())
            part.rename(path)
        except (FileNotFoundError, NotFoundError) as error:
            raise _lost(obj.key, "is gone") from error
        finally:
            part.unlink(missing_ok=True)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Reads `length` bytes from `start`; the caller verifies them.

        Raises:
            DataLoss: The object is gone or shorter.
        """
        try:
            with self._answering():
                data = self._get_range(key, start, length)
        except (FileNotFoundError, NotFoundError) as error:
            raise _lost(key, "is gone") from error
        if len(data) != length:
            raise _lost(key, f"has no {length} bytes at {start}")
        return data

    def exists(self, key: str) -> bool:
        """Says whether there is an object under `key`."""
        try:
            with self._answering():
                obstore.head(self._store, key)
        except (FileNotFoundError, NotFoundError):
            return False
        return True

    def delete(self, key: str) -> None:
        """Deletes an object; none there is fine."""
        with self._answering(), contextlib.suppress(FileNotFoundError, NotFoundError):
            obstore.delete(self._store, key)

    def list(self, prefix: str) -> Iterator[str]:
        """Yields the keys under `prefix`/."""
        with self._answering():
            for batch in obstore.list(self._store, prefix):
                for meta in batch:
                    yield str(meta["path"])

    def remove_unfinished(self, older_than_seconds: float) -> int:
        """Deletes what is left in a folder of puts whose process was killed; a bucket keeps none.

        Args:
            older_than_seconds: Since the last byte: younger ones may still be written.

        Returns:
            How many there were.
        """
        if self._is_remote:
            return 0
        num_removed = 0
        oldest = time.time() - older_than_seconds
        for folder, _, names in os.walk(urlsplit(self.url).path):
            for name in filter(_UNFINISHED.search, names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # its put has just ended
                    if path.stat().st_mtime < oldest:
                        path.unlink()
                        num_removed += 1
        return num_removed

    def _begin_put(self, key: str, data: bytes | Path) -> None:
        """Marks the places before an object is there; half of one is what a kill leaves."""
        faults.point("store.before_put")
        if not faults.is_armed("store.half_put") or self._is_remote:
            return
        whole = data if isinstance(data, bytes) else data.read_bytes()
        # As obstore names what it has not finished.
        half = Path(f"{urlsplit(self.url).path}/{key}#1")
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(whole[: len(whole) // 2])
        try:
            faults.point("store.half_put")
        finally:
            half.unlink()

    def _get_range(self, key: str, start: int, length: int) -> bytes:
        """Reads a range, or what there is of it."""
        try:
            return bytes(obstore.get_range(self._store, key, start=start, length=length))
        except BaseError as error:
            # It has no class of its own.
            if any(text in str(error) for text in _BEYOND_THE_END):
                return b""
            raise

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Says of a bucket that does not answer that it is away; a folder's errors say enough."""
        try:
            yield
        except (AlreadyExistsError, FileNotFoundError, NotFoundError):
            raise
        except BaseError as error:
            if not self._is_remote and _DISK_FULL in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            if not self._is_remote:
                raise
            raise Unavailable(
                f"the object store {self.url} does not answer: {_first_line(error)}; check it, its"
                " address and its credentials",
                reason="STORE_UNAVAILABLE",
            ) from error


def open_url(url: str) -> Store:
    """Opens a folder or a bucket; a bucket is asked again for half a minute."""
    if urlsplit(url).scheme == "file":
        return from_url(url)
    return from_url(url, retry_config=_RETRIES)


def _measure(data: bytes | Path) -> tuple[int, str]:
    if isinstance(data, bytes):
        return len(data), hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return data.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _check(obj: StoredObject, size_bytes: int, sha256: str) -> None:
    if (size_bytes, sha256) != (obj.size_bytes, obj.sha256):
        raise _lost(
            obj.key,
            f"has {size_bytes} bytes, SHA-256 {sha256}; recorded: {obj.size_bytes}, {obj.sha256}",
        )


def _lost(key: str, what: str) -> DataLoss:
    return DataLoss(
        f"stored object {key} {what}; restore it from a backup of the object store",
        reason="OBJECT_LOST",
        metadata={"key": key},
    )


def _first_line(error: BaseError) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]
