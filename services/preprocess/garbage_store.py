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


async def lock_object(conn: Connection, key: str) -> None:
    """Makes who begins to use an object and who deletes it wait for one another until the commit.

    Whoever stores an object locks it, notes its use, commits, and then looks whether it is still
    there: it was deleted before the lock, or will not be as long as the use is noted.
    """
    await conn.execute("select pg_advisory_xact_lock(hashtextextended('object ' || $1, 0))", key)


async def is_used(conn: Connection, key: str) -> bool:
    """Says whether a version's bundle needs an object.

    Of bundles that were made before their uses were noted it is not known what else they have
    than shards: as long as there is one, nothing else is deleted.
    """
    used: bool = await conn.fetchval(
        """
        select exists (select from shard where key = $1)
          or exists (select from bundle_object where key = $1)
          or not starts_with($1, 'bundles/shards/') and exists (
            select from preprocessing p where state = 'SUCCEEDED' and not exists (
              select from bundle_object o where o.version_id = p.version_id))
        """,
        key,
    )
    return used
