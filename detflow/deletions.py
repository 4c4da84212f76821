"""Objects are deleted only while no backup is being made."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from detflow.postgres import Database

if TYPE_CHECKING:
    import asyncpg

_LOCK = 0x64656C657465  # "delete"; advisory locks are the database's, so all services share it


@contextlib.asynccontextmanager
async def deleting(db: Database) -> AsyncIterator[bool]:
    """Says whether objects may be deleted now; a backup that begins waits until the block ends.

    Used by whoever deletes objects that rows have pointed to: a backup has read these rows, and
    copies the objects afterwards.

    Raises:
        Unavailable: Postgres is away.
    """
    async with db.connection() as conn:
        allowed = bool(await conn.fetchval("select pg_try_advisory_lock_shared($1)", _LOCK))
        try:
            yield allowed
        finally:
            if allowed:
                try:
                    await conn.execute("select pg_advisory_unlock_shared($1)", _LOCK)
                except BaseException:
                    conn.terminate()  # the lock goes with its session
                    raise


async def hold(conn: asyncpg.Connection[asyncpg.Record]) -> None:
    """Keeps objects from being deleted until the connection ends; waits for what is under way."""
    await conn.execute("select pg_advisory_lock($1)", _LOCK)
