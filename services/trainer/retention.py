"""What old trainings keep and nothing needs: checkpoints nobody went on from, and exports.

Deleting is marking: a checkpoint as one that no attempt goes on from, an export as deleted. The
sweeper and the exporter then delete objects and rows, as they do after any other end.
"""

from __future__ import annotations

import asyncio
import datetime
from collections import defaultdict
from dataclasses import dataclass

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.postgres import Connection, Database
from detflow.settings import Settings
from detflow.v1.common_pb2 import StoredObject
from services.trainer.domain import RESUMABLE
from services.trainer.export_domain import FINAL

log = telemetry.get_logger(__name__)

CHECKPOINT = "CHECKPOINT"
EXPORT = "EXPORT"

_PAUSE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ages:
    """How long after the end things go; None keeps them.

    Attributes:
        checkpoints: Of trainings that were paused or have failed.
        exports: Finished ones.
    """

    checkpoints: datetime.timedelta | None
    exports: datetime.timedelta | None

    @classmethod
    def of(cls, settings: Settings) -> Ages:
        """Reads the settings, where 0 keeps things."""

        def age(days: float) -> datetime.timedelta | None:
            return datetime.timedelta(days=days) if days else None

        return cls(checkpoints=age(settings.checkpoint_days), exports=age(settings.export_days))


@dataclass(frozen=True, kw_only=True, slots=True)
class Purged:
    """Things of one kind and project that were deleted; their sizes are in bytes."""

    kind: str
    project: str
    num: int
    size_bytes: int


async def purge(conn: Connection, ages: Ages, project: str | None) -> list[Purged]:
    """Deletes what is old enough, in one project or in all, in the caller's transaction."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    if ages.checkpoints is not None:
        for owner, obj in await _expire_checkpoints(conn, ages.checkpoints, project):
            found[CHECKPOINT, owner].append(obj.size_bytes)
    if ages.exports is not None:
        for owner, obj in await _expire_exports(conn, ages.exports, project):
            found[EXPORT, owner].append(obj.size_bytes)
    return [
        Purged(kind=kind, project=owner, num=len(sizes), size_bytes=sum(sizes))
        for (kind, owner), sizes in sorted(found.items())
    ]


async def _expire_checkpoints(
    conn: Connection, age: datetime.timedelta, project: str | None
) -> list[tuple[str, StoredObject]]:
    # A training that is resumed at this moment is passed over, or resumed without.
    rows = await conn.fetch(
        """
        with old as (
          select id, project from training
          where state = any($1) and end_time < now() - $2::interval
            and ($3::text is null or project = $3)
            and exists (select from checkpoint c where c.training_id = training.id and not unused)
          order by id for update skip locked)
        update checkpoint c set unreadable = true, unused = true from old
        where c.training_id = old.id and not c.unused returning old.project, c.object
        """,
        list(RESUMABLE),
        age,
        project,
    )
    return [(row["project"], StoredObject.FromString(row["object"])) for row in rows]


async def _expire_exports(
    conn: Connection, age: datetime.timedelta, project: str | None
) -> list[tuple[str, StoredObject]]:
    rows = await conn.fetch(
        """
        update export e set deleted = true from training t
        where t.id = e.training_id and e.state = any($1) and not e.deleted
          and e.end_time < now() - $2::interval and ($3::text is null or t.project = $3)
        returning t.project, coalesce(e.object, '') as object
        """,
        list(FINAL),
        age,
        project,
    )
    return [(row["project"], StoredObject.FromString(row["object"])) for row in rows]


class Retention:
    """Deletes by the settings, from time to time.

    Args:
        db: Database of the service.
        ages: How long what is kept.
    """

    def __init__(self, db: Database, ages: Ages) -> None:
        self._db = db
        self._ages = ages

    async def run(self) -> None:
        """Works for ever; while the database is away it waits."""
        while True:
            try:
                async with self._db.transaction() as conn:
                    purged = await purge(conn, self._ages, None)
                if purged:
                    log.info("old artifacts deleted", artifacts=[repr(one) for one in purged])
            except Unavailable as error:
                log.warning("retention waits for the database", error=error.message)
            await asyncio.sleep(_PAUSE_SECONDS)
