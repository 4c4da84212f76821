"""What is to be deleted from the object store: SQL beside the function that runs it.

A prefix becomes garbage in the transaction that makes it useless, and is deleted afterwards, so
that neither a rollback nor a kill loses or keeps what it should not.
"""

from __future__ import annotations

from detflow.postgres import Connection


async def insert_garbage(conn: Connection, prefix: str) -> None:
    """Marks the objects under a prefix to be deleted."""
    await conn.execute("insert into garbage (prefix) values ($1) on conflict do nothing", prefix)


async def insert_garbage_unless_used(conn: Connection, dataset_id: str, prefix: str) -> None:
    """Marks the objects under a prefix to be deleted, unless images of the dataset are there."""
    await conn.execute(
        """
        insert into garbage (prefix)
        select $2 where not exists (
          select 1 from image where dataset_id = $1 and starts_with(shard_key, $2 || '/')
        )
        on conflict do nothing
        """,
        dataset_id,
        prefix,
    )


async def list_garbage(conn: Connection) -> list[str]:
    """Reads the prefixes that are to be emptied."""
    rows = await conn.fetch(
        "select prefix from garbage where collect_time <= now() order by collect_time limit 100"
    )
    return [row["prefix"] for row in rows]


async def delete_garbage(conn: Connection, prefix: str) -> None:
    """Forgets a prefix that is empty now, or used."""
    await conn.execute("delete from garbage where prefix = $1", prefix)
