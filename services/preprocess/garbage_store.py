"""What is to be deleted from the object store: SQL beside the function that runs it.

A prefix becomes garbage in the transaction that makes it useless, and is deleted afterwards, so
that neither a rollback nor a kill loses or keeps what it should not.
"""

from __future__ import annotations

from datetime import timedelta

from detflow.postgres import Connection


async def insert_garbage(conn: Connection, prefix: str) -> None:
    """Marks the objects under a prefix to be deleted."""
    await conn.execute("insert into garbage (prefix) values ($1) on conflict do nothing", prefix)


async def insert_garbage_later(conn: Connection, prefix: str, delay: timedelta) -> None:
    """Marks what is about to be stored; `delete_garbage` takes that back once something uses it."""
    await conn.execute(
        "insert into garbage (prefix, collect_time) values ($1, now() + $2)", prefix, delay
    )


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


async def delete_old_uploads(conn: Connection) -> int:
    """Deletes uploads of more than a week ago that no import needs; the archives become garbage.

    Returns:
        How many there were.
    """
    rows = await conn.fetch(
        """
        with old as (
          delete from upload u where create_time < now() - interval '7 days' and not exists (
            select 1 from dataset d where d.upload_id = u.id and d.state = 'IMPORTING')
          returning id
        )
        insert into garbage (prefix) select 'uploads/' || id from old returning prefix
        """
    )
    return len(rows)
