"""The audit log: what the services tell of calls that change something, one row for each."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, timedelta

from detflow import events
from detflow.access import EVERYWHERE
from detflow.consumer import Consumer
from detflow.events import Bus, Delivered
from detflow.names import project_of
from detflow.postgres import Connection, Database
from detflow.times import timestamp
from detflow.v1 import access_pb2, events_pb2

NAME = "version-audit"
KEPT = timedelta(days=400)


def consumer(bus: Bus, db: Database) -> Consumer[events_pb2.Event]:
    """Makes the consumer that fills the log."""
    return Consumer(
        bus,
        db,
        name=NAME,
        stream=events.EVENTS_STREAM,
        subjects=["detflow.v1.audit.>"],
        decode=events_pb2.Event.FromString,
        handle=project,
    )


async def project(conn: Connection, delivered: Delivered[events_pb2.Event]) -> None:
    """Writes a beginning or an end down, in whichever order and how often they come."""
    entry = delivered.message.audit
    await conn.execute(
        """
        insert into audit_entry (
          id, subject, method, resource, project_id, create_time, done, code, request_id, peer)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        on conflict (id) do update set done = true, code = excluded.code where excluded.done
        """,
        entry.id,
        entry.subject,
        entry.method,
        entry.resource,
        project_of(entry.project) if entry.project else "",
        entry.create_time.ToDatetime(UTC),
        entry.done,
        entry.code,
        entry.request_id,
        entry.peer,
    )


async def list_entries(
    conn: Connection,
    project_id: str,
    *,
    subject: str,
    resource: str,
    before: str | None,
    limit: int,
) -> Sequence[access_pb2.AuditEntry]:
    """Reads at most `limit` entries, newest first.

    Args:
        conn: Connection.
        project_id: Those of a project; "-": all.
        subject: Only of this one; "" is all.
        resource: Only on it and what is below it; "" is all.
        before: Beginning before this id; None begins with the newest.
        limit: How many.
    """
    conditions, values = ["true"], list[object]([limit])

    def where(condition: str, value: object) -> None:
        values.append(value)
        conditions.append(condition.replace("$", f"${len(values)}"))

    if project_id != EVERYWHERE:
        where("project_id = $", project_id)
    if subject:
        where("subject = $", subject)
    if resource:
        where("(resource = $ or starts_with(resource, $ || '/'))", resource.rstrip("/"))
    if before is not None:
        where("id < $", before)
    rows = await conn.fetch(
        f"select * from audit_entry where {' and '.join(conditions)} order by id desc limit $1",
        *values,
    )
    return [
        access_pb2.AuditEntry(
            id=row["id"],
            subject=row["subject"],
            method=row["method"],
            resource=row["resource"],
            project=f"projects/{row['project_id']}" if row["project_id"] else "",
            create_time=timestamp(row["create_time"]),
            done=row["done"],
            code=row["code"],
            request_id=row["request_id"],
            peer=row["peer"],
        )
        for row in rows
    ]


async def delete_old(conn: Connection) -> None:
    """Removes the entries that were kept long enough."""
    await conn.execute("delete from audit_entry where create_time < now() - $1::interval", KEPT)
