"""Deletes what nothing needs any more: first the object, then its row."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from detflow import telemetry
from detflow.postgres import Database
from detflow.store import ObjectStore
from services.trainer import attempts, checkpoints, purge, weights

log = telemetry.get_logger(__name__)


class Sweeper:
    """Deletes what no attempt goes on from, no record tells of, nobody can use or was purged."""

    def __init__(self, db: Database, objects: ObjectStore) -> None:
        self._db = db
        self._objects = objects

    async def sweep(self) -> None:
        """Deletes what there is, at most some hundred objects."""
        async with self._db.connection() as conn:
            unused = await checkpoints.list_unused(conn)
            unstored = await weights.list_unstored(conn)
            ended = await attempts.list_unswept(conn)
        for checkpoint in unused:
            if not await self._delete(checkpoint.object.key):
                return
            async with self._db.transaction() as conn:
                await checkpoints.delete_checkpoint(conn, checkpoint)
        for one in unstored:
            if not await self._delete(one.object.key):
                return
            async with self._db.transaction() as conn:
                await weights.forget_weights(conn, one.id)
        for attempt in ended:
            # What a worker stored and could not tell of any more.
            if not await self._empty(attempt.prefix, keep=attempt.recorded):
                return
            async with self._db.transaction() as conn:
                await attempts.update_swept(conn, attempt)
        await self._purge()

    async def _purge(self) -> None:
        """Deletes what purged versions leave behind."""
        async with self._db.transaction() as conn:
            gone = await purge.delete_purged_trainings(conn)
        if gone:
            log.info("trainings deleted with their versions", trainings=gone)
        async with self._db.connection() as conn:
            garbage = await purge.list_garbage(conn)
        for prefix in garbage:
            if not await self._empty(prefix):
                return
            async with self._db.connection() as conn:
                await purge.delete_garbage(conn, prefix)

    async def _empty(self, prefix: str, keep: Collection[str] = ()) -> bool:
        """Deletes the objects under a prefix but some; says whether that worked."""
        try:
            keys = await asyncio.to_thread(lambda: list(self._objects.list(prefix)))
        except Exception as error:
            log.warning("objects not listed", prefix=prefix, error=repr(error))
            return False
        for key in keys:
            if key not in keep and not await self._delete(key):
                return False
        return True

    async def _delete(self, key: str) -> bool:
        """Deletes an object; says whether that worked."""
        try:
            await asyncio.to_thread(self._objects.delete, key)
        except Exception as error:
            # Whatever the object store's trouble is, it must not keep trainings from running.
            log.warning("object not deleted", key=key, error=repr(error))
            return False
        return True
