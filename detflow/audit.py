"""Who did what: an event before each call that changes something, and one after it.

The version service puts both together. A call whose process dies leaves an entry without an end.
"""

from __future__ import annotations

import grpc

from detflow import outbox, policy, telemetry
from detflow.access import EVERYWHERE
from detflow.errors import Unavailable
from detflow.names import new_id
from detflow.postgres import Connection, Database
from detflow.v1 import access_pb2, events_pb2

log = telemetry.get_logger(__name__)

_MAX_RESOURCE = 512


class Audit:
    """Writes the events into the outbox, each in a transaction of its own.

    Args:
        db: Database of the service.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    async def begun(self, entry: access_pb2.AuditEntry) -> None:
        """Writes that a call is about to be carried out.

        Raises:
            Unavailable: The database is away; the call must not be carried out.
        """
        await self._append(entry, "begun")

    async def refused(self, entry: access_pb2.AuditEntry, code: grpc.StatusCode) -> None:
        """Writes that a call was not let in.

        Raises:
            Unavailable: The database is away.
        """
        entry.done, entry.code = True, code.value[0]
        await self._append(entry, "ended")

    async def ended(self, entry: access_pb2.AuditEntry, code: grpc.StatusCode) -> None:
        """Writes how a call went; where that cannot be written its entry stays without an end."""
        entry.done, entry.code = True, code.value[0]
        try:
            await self._append(entry, "ended")
        except Unavailable as error:
            log.warning("end of a call not audited", entry=entry.id, error=str(error))

    async def _append(self, entry: access_pb2.AuditEntry, what: str) -> None:
        async with self._db.transaction() as conn:
            await append(conn, entry, what)


def make_entry(
    *, subject: str, method: str, resource: str, request_id: str, peer: str
) -> access_pb2.AuditEntry:
    """Makes the entry of a call that comes now."""
    project_id = policy.project_of(resource)
    entry = access_pb2.AuditEntry(
        id=new_id(),
        subject=subject,
        method=method,
        resource=resource[:_MAX_RESOURCE],
        project="" if project_id in ("", EVERYWHERE) else f"projects/{project_id}",
        request_id=request_id,
        peer=peer,
    )
    entry.create_time.GetCurrentTime()
    return entry


async def append(conn: Connection, entry: access_pb2.AuditEntry, what: str) -> None:
    """Writes that a call has begun or ended, in the caller's transaction."""
    await outbox.append(
        conn,
        kind="audit",
        resource_id=entry.id,
        what=what,
        name=entry.resource,
        event=events_pb2.Event(audit=entry),
    )
