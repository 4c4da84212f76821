"""What the preprocess service does when a version is created, deleted, undeleted or purged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from detflow import telemetry
from detflow.consumer import AfterCommit, Consumer
from detflow.events import EVENTS_STREAM, Bus, Delivered
from detflow.names import last_segment
from detflow.postgres import Connection, Database
from detflow.recipes import resolve_recipe
from detflow.v1 import events_pb2
from services.preprocess import bundle_store as sql
from services.preprocess.events import append_state

log = telemetry.get_logger(__name__)

SUBJECTS = tuple(
    f"detflow.v1.version.*.{what}" for what in ("created", "deleted", "undeleted", "purged")
)


class VersionEvents:
    """Handles the events of versions.

    Args:
        wake: Awaited after a new preprocessing is committed.
    """

    def __init__(self, wake: Callable[[], Awaitable[None]]) -> None:
        self._wake = wake

    def consumer(self, bus: Bus, db: Database) -> Consumer[events_pb2.Event]:
        """Makes the durable consumer."""
        return Consumer(
            bus,
            db,
            name="preprocess-versions",
            stream=EVENTS_STREAM,
            subjects=SUBJECTS,
            decode=events_pb2.Event.FromString,
            handle=self.handle,
        )

    async def handle(
        self, conn: Connection, delivered: Delivered[events_pb2.Event]
    ) -> AfterCommit | None:
        """Applies one event.

        Each carries the whole version, so the order of arrival does not matter, nor whether one of
        them never comes.
        """
        version = delivered.message.version
        await sql.lock_version(conn, delivered.resource_id)
        if delivered.what == "purged":
            await sql.purge_version(conn, delivered.resource_id)
            return None
        if await sql.is_purged(conn, delivered.resource_id):
            return None
        deleted = delivered.what == "deleted"
        created = await sql.insert_preprocessing(
            conn,
            version_name=version.name,
            version_deleted=deleted,
            version_revision=version.revision,
            dataset_id=last_segment(version.dataset),
            recipe=resolve_recipe(version.recipe).SerializeToString(deterministic=True),
        )
        if created is not None:
            await append_state(conn, created)
        elif delivered.what != "created":
            await sql.update_version_deleted(
                conn, delivered.resource_id, deleted=deleted, version_revision=version.revision
            )
        if deleted and (cancelled := await sql.cancel_preprocessing(conn, delivered.resource_id)):
            await append_state(conn, cancelled)
            log.info("preprocessing cancelled", version=cancelled.version_name)
            return None
        return self._wake if created is not None else None
