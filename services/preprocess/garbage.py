"""Deleting from the object store what nothing points to any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from obstore.exceptions import BaseError

from detflow import telemetry
from detflow.deletions import deleting
from detflow.postgres import Database
from detflow.store import ObjectStore
from services.preprocess import garbage_store as sql
from services.preprocess.leases import WorkLoop
from services.preprocess.upload_store import delete_expired_uploads

log = telemetry.get_logger(__name__)

SHARED = "bundles/"
"""What the keys of objects begin with that several versions may use."""

_OLD_UPLOADS_SECONDS = 600.0
_UNFINISHED_SECONDS = 3600.0


class GarbageCollector:
    """Empties the prefixes that were marked; several processes may do so side by side."""

    def __init__(self, *, db: Database, store: ObjectStore) -> None:
        self._db = db
        self._store = store
        self._next_old_uploads = 0.0
        self._next_unfinished = 0.0
        self.loop = WorkLoop("garbage", self.step)

    async def step(self) -> bool:
        """Empties what is marked now; always False, so that the loop waits before the next look."""
        if time.monotonic() >= self._next_old_uploads:
            self._next_old_uploads = time.monotonic() + _OLD_UPLOADS_SECONDS
            async with self._db.transaction() as conn:
                await delete_expired_uploads(conn)
        if time.monotonic() >= self._next_unfinished:
            self._next_unfinished = time.monotonic() + _UNFINISHED_SECONDS
            await self._remove_unfinished()
        async with self._db.connection() as conn:
            prefixes = await sql.list_garbage(conn)
        if prefixes:
            async with deleting(self._db) as allowed:
                if allowed:
                    await self._delete(prefixes)
        return False

    async def _remove_unfinished(self) -> None:
        """Deletes what writers of any service, killed in the middle of an object, have left."""
        try:
            num_removed = await asyncio.to_thread(
                self._store.remove_unfinished, _UNFINISHED_SECONDS
            )
        except OSError as error:
            log.warning("unfinished objects not removed", error=str(error))
            return
        if num_removed:
            log.info("unfinished objects removed", num_objects=num_removed)

    async def _delete(self, prefixes: Sequence[str]) -> None:
        for prefix in prefixes:
            try:
                if prefix.startswith(SHARED):
                    await self._delete_unused(prefix)
                    continue
                await asyncio.to_thread(empty, self._store, prefix)
            except BaseError as error:  # the object store is away: the mark stays
                log.warning("garbage waits", prefix=prefix, error=str(error))
                break
            async with self._db.connection() as conn:
                await sql.delete_garbage(conn, prefix)

    async def _delete_unused(self, key: str) -> None:
        """Deletes an object that versions share, unless one of them uses it."""
        async with self._db.transaction() as conn:
            await sql.lock_object(conn, key)
            # The mark goes first: who purges the last version that uses it then waits for our end
            # and sets it again, or was first, and then the object is not used.
            await sql.delete_garbage(conn, key)
            if not await sql.is_used(conn, key):
                await asyncio.to_thread(self._store.delete, key)


def empty(store: ObjectStore, prefix: str, keep: str = "") -> None:
    """Deletes an object, or those under it whose key does not begin with `keep`."""
    keys = list(store.list(prefix))
    if not keys and store.exists(prefix):
        keys = [prefix]
    for key in keys:
        if not keep or not key.startswith(keep):
            store.delete(key)
