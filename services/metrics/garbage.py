"""Deletes what nothing points to any more from the object store; SQL beside its function.

An object is marked before it is stored, or with the deletion of the row that names it, and the mark
is taken away by the transaction that records the object: so a kill at any moment neither leaves
one behind nor deletes one that is used.
"""

from __future__ import annotations

import asyncio

from detflow import telemetry
from detflow.deletions import deleting
from detflow.errors import DetflowError
from detflow.postgres import Connection, Database
from detflow.store import ObjectStore
from detflow.tasks import wait

log = telemetry.get_logger(__name__)

_POLL_SECONDS = 10.0


async def mark(conn: Connection, key: str, *, after_seconds: float = 0.0) -> None:
    """Marks an object to be deleted after some time unless it is recorded until then."""
    await conn.execute(
        "insert into garbage (key, collect_time) values ($1, now() + make_interval(secs => $2))"
        " on conflict (key) do update set collect_time = excluded.collect_time",
        key,
        after_seconds,
    )


async def unmark(conn: Connection, key: str) -> None:
    """Takes the mark of an object away that is recorded now."""
    await conn.execute("delete from garbage where key = $1", key)


class GarbageCollector:
    """Deletes what is marked; several processes may do so side by side.

    Args:
        db: Database of the service.
        objects: Object store.
    """

    def __init__(self, db: Database, objects: ObjectStore) -> None:
        self._db = db
        self._objects = objects

    async def run(self) -> None:
        """Works forever; while the database or the object store is away it waits."""
        never = asyncio.Event()
        while True:
            try:
                while await self.collect_one():
                    pass
            except (DetflowError, OSError) as error:
                log.warning("garbage waits", error=str(error))
            await wait(never, _POLL_SECONDS)

    async def collect_one(self) -> bool:
        """Deletes the object that has been due longest; False if none is, or none may be now."""
        async with deleting(self._db) as allowed, self._db.transaction() as conn:
            if not allowed:
                return False
            # Whoever marks the object again waits until it is gone.
            key = await conn.fetchval(
                """
                delete from garbage where key = (
                  select key from garbage where collect_time <= now()
                  order by collect_time limit 1 for update skip locked)
                returning key
                """
            )
            if key is None:
                return False
            await asyncio.to_thread(self._objects.delete, key)
        return True
