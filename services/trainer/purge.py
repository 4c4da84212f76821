"""What is left of purged versions, in Postgres: their trainings, and what those had stored."""

from __future__ import annotations

from detflow.postgres import Connection
from services.trainer.domain import LIVE, RESUMABLE
from services.trainer.export_domain import FINAL as FINAL_EXPORT


async def delete_purged_trainings(conn: Connection) -> list[str]:
    """Deletes the trainings of purged versions, with all that belongs to them.

    One stays for as long as it is live, as one of its exports is being made, or as a training of
    another version may yet begin with its weights. What the others had stored becomes garbage.

    Returns:
        The ids of those that are gone.
    """
    rows = await conn.fetch(
        """
        with chosen as (
          select t.id from training t join deleted_version d using (version)
          where d.purging and t.state <> all($1)
            and not exists (
              select from export e where e.training_id = t.id and e.state <> all($2))
            and not exists (
              select from training other
              where other.version <> t.version and other.state = any($3)
                and position(convert_to('trainings/' || t.id || '/', 'UTF8')
                             in other.warm_start_weights) > 0)
          order by t.id limit 100 for update of t skip locked
        ), gone as (
          delete from training t using chosen where t.id = chosen.id returning t.id
        ), marked as (
          insert into garbage (prefix)
          select 'trainings/' || id from gone
          union all select 'exports/' || e.id from export e join gone on e.training_id = gone.id
          on conflict do nothing
        )
        select id from gone
        """,
        list(LIVE),
        list(FINAL_EXPORT),
        list(LIVE | RESUMABLE),
    )
    await conn.execute(
        """
        update deleted_version set purging = false where version in (
          select version from deleted_version d
          where purging and not exists (select from training t where t.version = d.version)
          for update skip locked)
        """
    )
    return [row["id"] for row in rows]


async def list_garbage(conn: Connection) -> list[str]:
    """Reads prefixes in the object store that are to be emptied."""
    rows = await conn.fetch("select prefix from garbage order by create_time limit 100")
    return [row["prefix"] for row in rows]


async def delete_garbage(conn: Connection, prefix: str) -> None:
    """Forgets a prefix that is empty now."""
    await conn.execute("delete from garbage where prefix = $1", prefix)
