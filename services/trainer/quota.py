"""How many trainings of a project may be under way at once.

The version service knows it. What it said last is kept in Postgres, so that every process claims
and shows the queue by the same numbers, whoever is away.
"""

from __future__ import annotations

import asyncio

from detflow import telemetry
from detflow.errors import DetflowError, Unavailable
from detflow.postgres import Connection, Database
from detflow.projects import Projects

_PAUSE_SECONDS = 1.0

log = telemetry.get_logger(__name__)


class RunningQuotas:
    """Keeps the quotas of the projects whose trainings wait.

    Args:
        db: Database of the service.
        projects: Says what the quotas are, and remembers it for some seconds.
    """

    def __init__(self, db: Database, projects: Projects) -> None:
        self._db = db
        self._projects = projects
        self._kept: dict[str, int] = {}

    async def run(self) -> None:
        """Refreshes them for ever; apart from the claims, which wait for no other service."""
        while True:
            try:
                await self.refresh()
            except Unavailable as error:
                log.warning("quotas wait for the database", error=error.message)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def refresh(self) -> None:
        """Asks for the quota of every project in the queue; where nobody answers, the last counts.

        Raises:
            Unavailable: The database is away.
        """
        async with self._db.connection() as conn:
            waiting = await conn.fetch(
                "select distinct project from training where state = 'QUEUED'"
            )
        for row in waiting:
            try:
                await self.keep(row["project"])
            except DetflowError as error:
                log.warning("quota not known", project=row["project"], error=error.message)

    async def keep(self, project: str) -> None:
        """Asks for the quota of a project, and keeps it.

        Raises:
            NotFound: There is no such project.
            Unavailable: The version service, or the database, is away.
        """
        limit = (await self._projects.quota(f"projects/{project}")).max_running_trainings
        if self._kept.get(project) == limit:
            return
        async with self._db.transaction() as conn:
            await _update_quota(conn, project, limit)
        self._kept[project] = limit


async def _update_quota(conn: Connection, project: str, limit: int) -> None:
    if limit:
        await conn.execute(
            "insert into project_quota values ($1, $2)"
            " on conflict (project) do update set max_running = excluded.max_running",
            project,
            limit,
        )
    else:
        await conn.execute("delete from project_quota where project = $1", project)


async def lock_quotas(conn: Connection) -> None:
    """Makes claims wait for one another where quotas bind, or two would take the last place."""
    await conn.execute("select from project_quota order by project for update")
