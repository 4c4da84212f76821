"""Receiving archives in parts, so that an upload that breaks off goes on where it was.

Each part of at most 8 MiB is an object of its own. It is stored first; then the row of the upload
moves on, guarded by where it stood, so that of two writers one wins. Whatever dies in between
leaves an object that no row names, which goes with the upload's prefix.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from datetime import timedelta
from typing import Any

from detflow import faults, telemetry
from detflow.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    bad_field,
)
from detflow.names import last_segment, new_id, project_of
from detflow.postgres import Database
from detflow.projects import Projects
from detflow.store import ObjectStore
from detflow.uploads import full_disk_refused, next_message, receive_chunks
from detflow.v1 import dataset_pb2
from detflow.v1.common_pb2 import StoredObject
from services.preprocess import upload_store as sql
from services.preprocess.domain import Reason, Upload, UploadState, upload_prefix
from services.preprocess.quota import StorageQuota, check_quota

log = telemetry.get_logger(__name__)

PART_BYTES = 8 << 20
IDLE_SECONDS = 60.0
"""How long a writer may send nothing."""

RECEIVED_LIFETIME = timedelta(days=7)
"""How long an archive is kept that no import needs."""

_MAX_WRITERS = 8  # each holds at most two parts in memory; the others wait


class Uploads:
    """Receives archives.

    Args:
        db: Database of the service.
        store: Object store.
        projects: The projects there are.
        quota: How much they may store.
        max_bytes: Largest archive that is accepted.
        lifetime: How long an unfinished upload is kept after its last byte.
    """

    def __init__(
        self,
        *,
        db: Database,
        store: ObjectStore,
        projects: Projects,
        quota: StorageQuota,
        max_bytes: int,
        lifetime: timedelta,
    ) -> None:
        self._quota = quota
        self._db = db
        self._store = store
        self._projects = projects
        self._max_bytes = max_bytes
        self._lifetime = lifetime
        self._room = asyncio.Semaphore(_MAX_WRITERS)

    async def create(self, request: dataset_pb2.CreateUploadRequest) -> Upload:
        """Begins an upload, or finds the one that this request began.

        Raises:
            ResourceExhausted: ARCHIVE_LIMIT, QUOTA_EXCEEDED.
            InvalidArgument: REQUEST_ID_REUSED.
        """
        await self._projects.check(request.parent)
        if request.size_bytes > self._max_bytes:
            raise self._too_large()
        return await self._insert(
            project_of(request.parent), request.size_bytes, request.sha256, request.request_id
        )

    async def get(self, name: str) -> Upload:
        """Reads an upload.

        Raises:
            NotFound: There is none.
        """
        async with self._db.connection() as conn:
            return await sql.get_upload(conn, project_of(name), last_segment(name))

    async def delete(self, name: str) -> None:
        """Throws an upload away.

        Raises:
            NotFound: There is none.
            FailedPrecondition: UPLOAD_IN_USE.
        """
        async with self._db.transaction() as conn:
            await sql.delete_upload(conn, project_of(name), last_segment(name))

    async def receive(self, requests: AsyncIterator[dataset_pb2.UploadArchiveRequest]) -> Upload:
        """Receives an archive in one stream; one that breaks off is thrown away.

        Raises:
            InvalidArgument: The stream is cut off, empty or out of order.
            ResourceExhausted: ARCHIVE_LIMIT, QUOTA_EXCEEDED, DISK_FULL.
        """
        writer: PartWriter | None = None

        async def opened(request: dataset_pb2.UploadArchiveRequest) -> None:
            nonlocal writer
            await self._projects.check(request.parent)
            upload = await self._insert(project_of(request.parent), None, "", "")
            limit = await self._quota.limit(upload.project_id)
            writer = PartWriter(self._db, self._store, upload, self._lifetime, limit)

        async def write(chunk: bytes) -> None:
            assert writer is not None
            await writer.write(chunk)

        try:
            with full_disk_refused():
                async with self._room:
                    await receive_chunks(
                        requests,
                        write,
                        opening="parent",
                        opened=opened,
                        max_bytes=self._max_bytes,
                        too_large=self._too_large(),
                        noun="archive",
                        idle_seconds=IDLE_SECONDS,
                    )
                    assert writer is not None
                    await writer.flush()
                    if not writer.committed_bytes:
                        raise InvalidArgument(
                            "the upload holds no bytes; send the archive",
                            reason=Reason.CORRUPT_ARCHIVE,
                        )
                    return await self._complete(writer)
        except BaseException:
            if writer is not None:
                await _to_the_end(self._abandon(writer))
            raise

    async def write(self, requests: AsyncIterator[dataset_pb2.WriteUploadRequest]) -> Upload:
        """Adds bytes to an upload; what has come stays, however the stream ends.

        Raises:
            NotFound: There is no such upload.
            FailedPrecondition: WRONG_OFFSET: the bytes belong somewhere else.
            Aborted: UPLOAD_MOVED: another writer was faster.
            InvalidArgument: There are more bytes than the upload's size, or not the right ones.
            DeadlineExceeded: Nothing came for a minute.
            ResourceExhausted: DISK_FULL.
        """
        with full_disk_refused():
            async with self._room:
                first = await next_message(requests, IDLE_SECONDS)
                if first is None or not first.HasField("start"):
                    raise bad_field("start", "INVALID_FIELD", "say first where the bytes belong")
                upload = await self.get(first.start.name)
                if first.start.offset != upload.committed_bytes:
                    raise _wrong_offset(upload, first.start.offset)
                writer = PartWriter(self._db, self._store, upload, self._lifetime)
                try:
                    while (request := await next_message(requests, IDLE_SECONDS)) is not None:
                        if request.HasField("start"):
                            raise bad_field("start", "INVALID_FIELD", "is for the first message")
                        await writer.write(request.chunk)
                finally:
                    await _to_the_end(writer.flush())
        if writer.committed_bytes != upload.size_bytes:
            return await self.get(upload.name)
        return await self._complete(writer)

    async def _abandon(self, writer: PartWriter) -> None:
        await writer.abandon()
        await self.delete(writer.upload.name)

    async def _insert(
        self, project_id: str, size_bytes: int | None, sha256: str, request_id: str
    ) -> Upload:
        limit = await self._quota.limit(project_id)
        async with self._db.transaction() as conn:
            upload = await sql.insert_upload(
                conn,
                upload_id=new_id(),
                project_id=project_id,
                size_bytes=size_bytes,
                sha256=sha256,
                request_id=request_id,
                lifetime=self._lifetime,
            )
            await check_quota(conn, project_id, limit)
            return upload

    async def _complete(self, writer: PartWriter) -> Upload:
        """Ends an upload that has all its bytes, unless they have another hash than was said."""
        upload = writer.upload
        if upload.state is UploadState.RECEIVED:
            return upload
        sha256 = writer.sha256
        if sha256 is None:  # the beginning came in another stream
            async with self._db.connection() as conn:
                parts = await sql.list_parts(conn, upload.project_id, upload.id)
            sha256 = await asyncio.to_thread(_hash, self._store, parts)
        if upload.sha256 not in ("", sha256):
            await self.delete(upload.name)
            raise InvalidArgument(
                f"the archive has SHA-256 {sha256}, not {upload.sha256}: it was changed on its way"
                " or while it was read; begin the upload again",
                reason="HASH_MISMATCH",
            )
        async with self._db.transaction() as conn:
            completed = await sql.complete_upload(
                conn, upload.id, writer.committed_bytes, sha256, RECEIVED_LIFETIME
            )
        if completed is None:  # another writer was as far, or it was deleted
            return await self.get(upload.name)
        log.info("archive received", upload=upload.id, size_bytes=completed.size_bytes)
        return completed

    def _too_large(self) -> ResourceExhausted:
        return ResourceExhausted(
            f"the archive is larger than {self._max_bytes} bytes; split it or raise"
            " DETFLOW_MAX_UPLOAD_BYTES",
            reason=Reason.ARCHIVE_LIMIT,
        )


class PartWriter:
    """Stores the bytes that come behind those an upload has; one part while the next comes in.

    Args:
        db: Database of the service.
        store: Object store.
        upload: The upload.
        lifetime: How long it is kept from each part on.
        limit: Bytes that its project may have; 0 means no limit. Without effect where the
            upload's size is counted since its beginning.

    Attributes:
        upload: The upload as it was.
        committed_bytes: How many bytes it has by now.
    """

    def __init__(
        self,
        db: Database,
        store: ObjectStore,
        upload: Upload,
        lifetime: timedelta,
        limit: int = 0,
    ) -> None:
        self._limit = limit
        self.upload = upload
        self.committed_bytes = upload.committed_bytes
        self._db = db
        self._store = store
        self._lifetime = lifetime
        self._waiting = bytearray()
        self._under_way = 0
        self._storing: asyncio.Task[None] | None = None
        self._digest = None if upload.committed_bytes else hashlib.sha256()

    @property
    def sha256(self) -> str | None:
        """Hash of everything from the first byte on; None if that came before this writer."""
        return self._digest.hexdigest() if self._digest is not None else None

    async def write(self, chunk: bytes) -> None:
        """Takes the next bytes.

        Raises:
            InvalidArgument: UPLOAD_TOO_LONG: they are more than the upload has room for.
            Aborted: UPLOAD_MOVED.
        """
        size_bytes, expected = len(chunk), self.upload.size_bytes
        if expected is not None:
            size_bytes = min(size_bytes, expected - self._end)
        self._waiting += chunk[:size_bytes]
        if size_bytes < len(chunk):
            raise InvalidArgument(
                f"the upload was begun for {expected} bytes and more came; begin one for the"
                " archive as it is now",
                reason="UPLOAD_TOO_LONG",
            )
        if len(self._waiting) >= PART_BYTES:
            await self._begin_part()

    async def flush(self) -> None:
        """Stores what is still waiting.

        Raises:
            Aborted: UPLOAD_MOVED.
        """
        if self._waiting:
            await self._begin_part()
        await self._settle()

    async def abandon(self) -> None:
        """Stores nothing more."""
        self._waiting.clear()
        with contextlib.suppress(Exception):  # the caller has its own reason
            await self._settle()

    @property
    def _end(self) -> int:
        """Place behind the last byte that was taken."""
        return self.committed_bytes + self._under_way + len(self._waiting)

    async def _begin_part(self) -> None:
        await self._settle()
        data, self._waiting = bytes(self._waiting), bytearray()
        self._under_way = len(data)
        self._storing = asyncio.create_task(self._store_part(data))

    async def _settle(self) -> None:
        """Waits for the part that is under way; without it, what comes behind it is dropped."""
        if self._storing is None:
            return
        await asyncio.wait({self._storing})  # which goes on if this is cancelled
        storing, self._storing = self._storing, None
        try:
            storing.result()
        except Exception:
            self._waiting.clear()
            raise

    async def _store_part(self, data: bytes) -> None:
        key = f"{upload_prefix(self.upload.id)}/{self.committed_bytes:015d}-{new_id()}"
        faults.point("upload.before_part")
        part = await asyncio.to_thread(self._put, key, data)
        faults.point("upload.after_part")
        try:
            async with self._db.transaction() as conn:
                await sql.insert_part(
                    conn, self.upload.id, self.committed_bytes, part, self._lifetime
                )
                await check_quota(conn, self.upload.project_id, self._limit)
        except (Aborted, ResourceExhausted):
            await asyncio.to_thread(self._store.delete, key)
            raise
        self.committed_bytes += len(data)
        self._under_way = 0

    def _put(self, key: str, data: bytes) -> StoredObject:
        if self._digest is not None:
            self._digest.update(data)
        return self._store.put(key, data)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Does work to its end; a call that is cut off may be cancelled a moment later than it ends."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait({task})


def _wrong_offset(upload: Upload, offset: int) -> FailedPrecondition:
    return FailedPrecondition(
        f"{upload.name} has {upload.committed_bytes} bytes: go on there, not at {offset}",
        reason="WRONG_OFFSET",
        metadata={"committed_bytes": str(upload.committed_bytes)},
    )


def _hash(store: ObjectStore, parts: Sequence[StoredObject]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(store.get(part))
    return digest.hexdigest()
