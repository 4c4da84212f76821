"""Removes what has ended: tickets, sessions and keys, and what the audit log kept long enough."""

from __future__ import annotations

import asyncio

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.postgres import Database
from services.version import audit_log, sessions

log = telemetry.get_logger(__name__)

_LOOK_SECONDS = 600.0


async def run(db: Database) -> None:
    """Removes forever what has ended."""
    while True:
        try:
            async with db.transaction() as conn:
                await sessions.delete_ended(conn)
                await audit_log.delete_old(conn)
        except Unavailable as error:
            log.warning("upkeep waits for the database", error=str(error))
        await asyncio.sleep(_LOOK_SECONDS)
