"""How much a project has stored, and whether that is within its quota.

What a project adds is written first and counted then, in one transaction, with the project's lock:
of two that are too much together, the one that counts last is refused. The limit is the version
service's to say; for some seconds after a change the old one may count.
"""

from __future__ import annotations

from dataclasses import dataclass

from detflow.errors import ResourceExhausted
from detflow.postgres import Connection, Database
from detflow.projects import Projects


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a project has stored.

    Attributes:
        upload_bytes: Archives that are received or being received, but those that were imported:
            they go by themselves. Where the size was said at the beginning, it counts from there.
        dataset_bytes: Images of datasets.
        bundle_bytes: Shards of bundles; one that several versions have counts once.
    """

    upload_bytes: int
    dataset_bytes: int
    bundle_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.upload_bytes + self.dataset_bytes + self.bundle_bytes


class StorageQuota:
    """Checks what projects add.

    Args:
        db: Database of the service.
        projects: Says what the quotas are.
    """

    def __init__(self, db: Database, projects: Projects) -> None:
        self._db = db
        self._projects = projects

    async def limit(self, project_id: str) -> int:
        """Returns the bytes a project may have; 0 means no limit.

        Raises:
            NotFound: There is no such project.
            Unavailable: The version service is away and has never said it.
        """
        quota = await self._projects.quota(f"projects/{project_id}")
        return quota.max_storage_bytes

    async def room(self, project_id: str, limit: int, *, besides: str | None = None) -> int | None:
        """Returns the bytes that a project may still add; None means no limit.

        Args:
            project_id: Id of the project.
            limit: Its limit.
            besides: Id of an upload that is not counted, for it is being imported.
        """
        if not limit:
            return None
        async with self._db.connection() as conn:
            usage = await get_usage(conn, project_id, besides=besides)
        return limit - usage.total_bytes


async def check_quota(conn: Connection, project_id: str, limit: int) -> None:
    """Checks what the transaction has added, together with all else.

    Args:
        conn: Connection, in the transaction that has added something.
        project_id: Id of the project.
        limit: Bytes it may have; 0 means no limit.

    Raises:
        ResourceExhausted: QUOTA_EXCEEDED.
    """
    if not limit:
        return
    await conn.execute(
        "select pg_advisory_xact_lock(hashtextextended('quota ' || $1, 0))", project_id
    )
    usage = await get_usage(conn, project_id)
    if usage.total_bytes > limit:
        raise exceeded(project_id, usage.total_bytes, limit)


def exceeded(project_id: str, used_bytes: int, limit: int) -> ResourceExhausted:
    """Returns the error of whoever adds too much.

    Args:
        project_id: Id of the project.
        used_bytes: What it would have had.
        limit: What it may have.
    """
    return ResourceExhausted(
        f"projects/{project_id} would have {used_bytes} bytes and may have {limit}: delete uploads,"
        " datasets or versions it does not need, or have its quota raised",
        reason="QUOTA_EXCEEDED",
        metadata={
            "resource": f"projects/{project_id}",
            "used_bytes": str(used_bytes),
            "max_storage_bytes": str(limit),
        },
    )


async def get_usage(conn: Connection, project_id: str, *, besides: str | None = None) -> Usage:
    """Counts what a project has stored, but one upload."""
    row = await conn.fetchrow(
        """
        select
          (select coalesce(sum(coalesce(size_bytes, committed_bytes)), 0)::bigint from upload
           where project_id = $1 and id is distinct from $2 and not exists (
             select from dataset d where d.upload_id = upload.id and d.state = 'READY')
          ) as upload_bytes,
          (select coalesce(sum(num_bytes), 0)::bigint from dataset
           where project_id = $1) as dataset_bytes,
          (select coalesce(sum(size_bytes), 0)::bigint from (
             select distinct s.key, s.size_bytes
             from shard s join preprocessing p using (version_id)
             where split_part(p.version_name, '/', 2) = $1) as shards) as bundle_bytes
        """,
        project_id,
        besides,
    )
    assert row is not None
    return Usage(**row)
