"""What the trainer knows of versions: which are in the trash, and one lock for each."""

from __future__ import annotations

from detflow.errors import NotFound, not_found
from detflow.postgres import Connection


async def lock_version(conn: Connection, version: str) -> None:
    """Makes start, resume and delete of one version wait for one another until the commit."""
    await conn.execute(
        "select pg_advisory_xact_lock(hashtextextended('version ' || $1, 0))", version
    )


async def update_deleted_version(
    conn: Connection, version: str, *, deleted: bool, seq: int, purged: bool = False
) -> bool:
    """Notes that a version went to the trash, came back or is gone; False if newer is known."""
    row = await conn.fetchrow(
        """
        insert into deleted_version (version, seq, deleted, purging) values ($1, $2, $3, $4)
        on conflict (version) do update
        set seq = excluded.seq, deleted = excluded.deleted, purging = excluded.purging
        where deleted_version.seq < excluded.seq
        returning version
        """,
        version,
        seq,
        deleted,
        purged,
    )
    return row is not None


async def is_deleted(conn: Connection, version: str) -> bool:
    """Says whether a version is known to be in the trash."""
    return bool(
        await conn.fetchval("select deleted from deleted_version where version = $1", version)
    )


def version_not_found(project: str, version: str) -> NotFound:
    """Returns the error for a version that is not there, in the trash or of another project."""
    return not_found(f"projects/{project}/versions/{version}")
