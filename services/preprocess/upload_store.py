"""Uploads and their parts in Postgres: SQL beside the function that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg

from detflow.errors import Aborted, FailedPrecondition, bad_field, not_found
from detflow.postgres import Connection
from detflow.v1.common_pb2 import StoredObject
from services.preprocess.domain import Upload, UploadState, upload_prefix
from services.preprocess.garbage_store import insert_garbage

_UPLOAD = """
  id, project_id, state, size_bytes, committed_bytes, sha256, create_time, expire_time
"""


def _upload(row: asyncpg.Record) -> Upload:
    values: dict[str, Any] = dict(row)
    values["state"] = UploadState(row["state"])
    return Upload(**values)


async def insert_upload(
    conn: Connection,
    *,
    upload_id: str,
    project_id: str,
    size_bytes: int | None,
    sha256: str,
    request_id: str,
    lifetime: timedelta,
) -> Upload:
    """Records an upload to be received, or finds the one that the request id made.

    Args:
        conn: Connection.
        upload_id: Id of a new one.
        project_id: Project.
        size_bytes: Size of the archive; None if only its end will tell.
        sha256: Hash that the archive must have; empty if it is not known.
        request_id: Name of the request; empty for none.
        lifetime: How long it is kept from now on.

    Raises:
        InvalidArgument: REQUEST_ID_REUSED: the request id was used for another archive.
    """
    row = await conn.fetchrow(
        f"""
        insert into upload (id, project_id, state, size_bytes, sha256, request_id, expire_time)
        values ($1, $2, 'RECEIVING', $3, $4, nullif($5, ''), now() + $6)
        on conflict on constraint upload_request_id do update
          set expire_time = greatest(upload.expire_time, now() + $6)
        returning {_UPLOAD}
        """,
        upload_id,
        project_id,
        size_bytes,
        sha256,
        request_id,
        lifetime,
    )
    assert row is not None
    upload = _upload(row)
    if upload.size_bytes != size_bytes or (sha256 and upload.sha256 not in ("", sha256)):
        raise bad_field(
            "request_id",
            "REQUEST_ID_REUSED",
            f"{request_id!r} began the upload of an archive of {upload.size_bytes} bytes, SHA-256"
            f" {upload.sha256 or 'unknown'}; choose another for this one",
        )
    return upload


async def get_upload(
    conn: Connection, project_id: str, upload_id: str, *, lock: bool = False
) -> Upload:
    """Reads an upload.

    Args:
        conn: Connection.
        project_id: Project.
        upload_id: Upload.
        lock: Keep it from being deleted until the transaction ends.

    Raises:
        NotFound: There is none in this project.
    """
    row = await conn.fetchrow(
        f"select {_UPLOAD} from upload where id = $1 and project_id = $2"
        + (" for share" if lock else ""),
        upload_id,
        project_id,
    )
    if row is None:
        raise not_found(f"projects/{project_id}/uploads/{upload_id}", "; upload it again")
    return _upload(row)


async def list_parts(conn: Connection, project_id: str, upload_id: str) -> list[StoredObject]:
    """Reads the parts of an upload, in order.

    Raises:
        NotFound: There is none in this project.
    """
    await get_upload(conn, project_id, upload_id)
    rows = await conn.fetch(
        "select key, size_bytes, sha256 from upload_part where upload_id = $1 order by start",
        upload_id,
    )
    return [StoredObject(**dict(row)) for row in rows]


async def insert_part(
    conn: Connection, upload_id: str, start: int, part: StoredObject, lifetime: timedelta
) -> None:
    """Adds the part that begins where the upload ends.

    Raises:
        Aborted: UPLOAD_MOVED: another writer added it first, or the upload was deleted.
    """
    moved = await conn.fetchval(
        """
        update upload set committed_bytes = $3, expire_time = now() + $4
        where id = $1 and state = 'RECEIVING' and committed_bytes = $2 returning true
        """,
        upload_id,
        start,
        start + part.size_bytes,
        lifetime,
    )
    if not moved:
        raise Aborted(
            f"another writer went on with this upload at {start} bytes, or it was deleted; get it"
            " and go on at its committed_bytes",
            reason="UPLOAD_MOVED",
        )
    await conn.execute(
        "insert into upload_part (upload_id, start, size_bytes, sha256, key)"
        " values ($1, $2, $3, $4, $5)",
        upload_id,
        start,
        part.size_bytes,
        part.sha256,
        part.key,
    )


async def complete_upload(
    conn: Connection, upload_id: str, size_bytes: int, sha256: str, lifetime: timedelta
) -> Upload | None:
    """RECEIVING -> RECEIVED; None if it is not RECEIVING, or has not so many bytes."""
    row = await conn.fetchrow(
        f"""
        update upload set state = 'RECEIVED', size_bytes = $2, sha256 = $3, expire_time = now() + $4
        where id = $1 and state = 'RECEIVING' and committed_bytes = $2
        returning {_UPLOAD}
        """,
        upload_id,
        size_bytes,
        sha256,
        lifetime,
    )
    return _upload(row) if row else None


async def delete_upload(conn: Connection, project_id: str, upload_id: str) -> None:
    """Deletes an upload; its parts become garbage.

    Raises:
        NotFound: There is none in this project.
        FailedPrecondition: UPLOAD_IN_USE: a dataset is being imported from it.
    """
    name = f"projects/{project_id}/uploads/{upload_id}"
    found = await conn.fetchval(
        "select true from upload where id = $1 and project_id = $2 for update",
        upload_id,
        project_id,
    )
    if not found:
        raise not_found(name)
    user = await conn.fetchval(
        "select id from dataset where upload_id = $1 and state = 'IMPORTING' limit 1", upload_id
    )
    if user is not None:
        raise FailedPrecondition(
            f"projects/{project_id}/datasets/{user} is being imported from {name}; wait for it, or"
            " delete it first",
            reason="UPLOAD_IN_USE",
            metadata={"dataset": f"projects/{project_id}/datasets/{user}"},
        )
    await conn.execute("delete from upload where id = $1", upload_id)
    await insert_garbage(conn, upload_prefix(upload_id))


async def delete_expired_uploads(conn: Connection) -> int:
    """Deletes uploads whose time is over and that no import needs; their parts become garbage.

    Returns:
        How many there were.
    """
    # Locked first: a dataset that is created meanwhile is seen by the second statement.
    rows = await conn.fetch(
        "select id from upload where expire_time < now() limit 1000 for update skip locked"
    )
    return await delete_unused_uploads(conn, [row["id"] for row in rows])


async def delete_unused_uploads(conn: Connection, upload_ids: Sequence[str]) -> int:
    """Deletes those uploads that no import needs; their parts become garbage.

    Returns:
        How many there were.
    """
    deleted = await conn.fetch(
        """
        with unused as (
          delete from upload u where id = any($1::text[]) and not exists (
            select 1 from dataset d where d.upload_id = u.id and d.state = 'IMPORTING')
          returning id
        )
        insert into garbage (prefix) select 'uploads/' || id from unused
        on conflict do nothing returning prefix
        """,
        list(upload_ids),
    )
    return len(deleted)
