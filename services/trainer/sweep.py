"""Deletes what nothing needs any more: first the object, then its row."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from detflow import telemetry
from detflow.deletions import deleting
from detflow.postgres import Database
from detflow.store import ObjectStore
from services.trainer import attempts, checkpoints, purge, weights

log = telemetry.get_logger(__name__)


_TRIES = "preflight"
_TRY_SECONDS = 3600.0


class Sweeper:
    """Deletes what no attempt goes on from, no record tells of, nobody can use or was purged.

    Args:
        db: Database of the service.
        objects: Object store.
        try_seconds: What a preflight stores for a moment and is there for so long, was left behind
            by one that was killed.
    """

    def __init__(
        self, db: Database, objects: ObjectStore, *, try_seconds: float = _TRY_SECONDS
    ) -> None:
        self._db = db
        self._objects = objects
        self._try_seconds = try_seconds
        self._tries: frozenset[str] = frozenset()
        self._tries_listed = float("-inf")

    async def sweep(self) -> None:
        """Deletes what there is, at most some hundred objects; nothing while a backup is made."""
        async with deleting(self._db) as allowed:
            if allowed:
                await self._sweep()

    async def _sweep(self) -> None:
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
        await self._delete_tries()

    async def _delete_tries(self) -> None:
        """Deletes what is there since the last look, a while ago; whoever stored it is gone."""
        if time.monotonic() - self._tries_listed < self._try_seconds:
            return
        keys = await self._list(_TRIES)
        if keys is None:
            return
        for key in self._tries.intersection(keys):
            if not await self._delete(key):
                return
        self._tries, self._tries_listed = frozenset(keys) - self._tries, time.monotonic()

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
        keys = await self._list(prefix)
        if keys is None:
            return False
        for key in keys:
            if key not in keep and not await self._delete(key):
                return False
        return True

    async def _list(self, prefix: str) -> list[str] | None:
        """Returns the keys under a prefix; None if the object store cannot say."""
        try:
            return await asyncio.to_thread(lambda: list(self._objects.list(prefix)))
        except Exception as error:
            log.warning("objects not listed", prefix=prefix, error=repr(error))
            return None

    async def _delete(self, key: str) -> bool:
        """Deletes an object; says whether that worked."""
        try:
            await asyncio.to_thread(self._objects.delete, key)
        except Exception as error:
            # Whatever the object store's trouble is, it must not keep trainings from running.
            log.warning("object not deleted", key=key, error=repr(error))
            return False
        return True
