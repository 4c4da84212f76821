"""The end of the trash: versions whose time in it is over are removed for good."""

from __future__ import annotations

import asyncio

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.postgres import Database
from services.version import store
from services.version.service import announce

log = telemetry.get_logger(__name__)

_LOOK_SECONDS = 30.0


class Purger:
    """Removes expired versions, one after the other; several processes may do so side by side.

    What hangs on a version elsewhere (bundle, trainings, figures) goes when its owner hears of the
    event, which is committed with the removal.
    """

    def __init__(self, db: Database, look_seconds: float = _LOOK_SECONDS) -> None:
        self._db = db
        self._look_seconds = look_seconds

    async def run(self) -> None:
        """Removes forever what expires."""
        while True:
            try:
                while await self.step():
                    pass
            except Unavailable as error:
                log.warning("purge waits for the database", error=str(error))
            await asyncio.sleep(self._look_seconds)

    async def step(self) -> bool:
        """Removes one version; False if there is none to remove."""
        async with self._db.transaction() as conn:
            version = await store.delete_expired(conn)
            if version is None:
                return False
            await announce(conn, version, "purged")
        log.info("version purged", version=version.name, display_name=version.display_name)
        return True
