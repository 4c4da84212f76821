"""Exports in Postgres: a transition is one guarded statement, its event committed with it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import asyncpg

from detflow import outbox
from detflow.postgres import Connection
from detflow.times import timestamp
from detflow.v1 import events_pb2, export_pb2
from detflow.v1.common_pb2 import Failure, StoredObject
from services.trainer.export_domain import FINAL, Export, State, sources_of


def to_message(export: Export) -> export_pb2.Export:
    """Returns an export as the API shows it."""
    message = export_pb2.Export()
    message.CopyFrom(export.options)
    message.MergeFrom(
        export_pb2.Export(
            name=export.name,
            state=export_pb2.Export.State.Value(export.state),
            revision=export.revision,
            object=export.object,
            file_name=export.file_name,
            max_box_difference_px=export.max_box_difference_px,
            max_confidence_difference=export.max_confidence_difference,
            failure=export.failure,
            create_time=timestamp(export.create_time),
            end_time=timestamp(export.end_time),
        )
    )
    return message


def from_row(row: asyncpg.Record) -> Export:
    """Returns the export in a row."""
    stored, why = row["object"], row["failure"]
    return Export(
        id=row["id"],
        training=row["training"],
        state=State(row["state"]),
        revision=row["revision"],
        options=export_pb2.Export.FromString(row["options"]),
        file_name=row["file_name"],
        attempt=row["attempt"],
        owner=row["owner"],
        object=StoredObject.FromString(stored) if stored is not None else None,
        max_box_difference_px=row["max_box_difference_px"],
        max_confidence_difference=row["max_confidence_difference"],
        failure=Failure.FromString(why) if why is not None else None,
        create_time=row["create_time"],
        end_time=row["end_time"],
    )


async def _announce(conn: Connection, row: asyncpg.Record | None) -> Export | None:
    """Appends the event of a transition that took place."""
    if row is None:
        return None
    export = from_row(row)
    await outbox.append(
        conn,
        kind="export",
        resource_id=export.id,
        what="state_changed",
        name=export.name,
        event=events_pb2.Event(export=to_message(export)),
    )
    return export


async def insert_export(
    conn: Connection,
    *,
    export_id: str,
    training_id: str,
    training: str,
    request_id: str,
    options: export_pb2.Export,
    file_name: str,
) -> Export | None:
    """Queues a new export; None if the request id has made one before."""
    row = await conn.fetchrow(
        """
        insert into export (id, training_id, training, request_id, state, options, file_name)
        values ($1, $2, $3, nullif($4, ''), 'QUEUED', $5, $6)
        on conflict (training_id, request_id) do nothing
        returning *
        """,
        export_id,
        training_id,
        training,
        request_id,
        options.SerializeToString(deterministic=True),
        file_name,
    )
    return await _announce(conn, row)


async def get_by_request(conn: Connection, training_id: str, request_id: str) -> Export | None:
    """Reads the export that a request id made before, even if it has been deleted since."""
    row = await conn.fetchrow(
        "select * from export where training_id = $1 and request_id = $2", training_id, request_id
    )
    return from_row(row) if row else None


async def get_export(conn: Connection, export_id: str, *, lock: bool = False) -> Export | None:
    """Reads an export by its id; `lock` keeps it from changing until the transaction ends."""
    row = await conn.fetchrow(
        f"select * from export where id = $1 and not deleted {'for update' if lock else ''}",
        export_id,
    )
    return from_row(row) if row else None


async def list_exports(
    conn: Connection, *, training_id: str, before: str | None, limit: int
) -> list[Export]:
    """Reads exports of a training, newest first, older than `before`."""
    rows = await conn.fetch(
        """
        select * from export
        where training_id = $1 and not deleted and ($2::text is null or id < $2)
        order by id desc limit $3
        """,
        training_id,
        before,
        limit,
    )
    return [from_row(row) for row in rows]


async def ended_before(conn: Connection, export_id: str, *, seconds: float) -> bool:
    """Says whether an export ended at least so long ago, by the database's clock, or is gone."""
    ended: bool | None = await conn.fetchval(
        "select coalesce(end_time < now() - make_interval(secs => $2), false) from export"
        " where id = $1",
        export_id,
        seconds,
    )
    return ended is not False


async def claim_export(conn: Connection, owner: str, lease: datetime.timedelta) -> Export | None:
    """Takes on the oldest queued export: QUEUED -> RUNNING, with owner and lease."""
    row = await conn.fetchrow(
        """
        update export set state = 'RUNNING', revision = revision + 1, attempt = attempt + 1,
          owner = $1, lease_expire_time = now() + $2
        where state = 'QUEUED' and id = (
          select id from export where state = 'QUEUED' order by id limit 1 for update skip locked)
        returning *
        """,
        owner,
        lease,
    )
    return await _announce(conn, row)


async def renew_lease(conn: Connection, export: Export, lease: datetime.timedelta) -> bool:
    """Extends the lease of an attempt; False if it is not this owner's to make any more."""
    row = await conn.fetchrow(
        """
        update export set lease_expire_time = now() + $4
        where id = $1 and attempt = $2 and owner = $3 and state = 'RUNNING'
        returning id
        """,
        export.id,
        export.attempt,
        export.owner,
        lease,
    )
    return row is not None


async def lock_expired(conn: Connection, owner: str, made: Iterable[str]) -> Export | None:
    """Locks an export whose lease is over, except those that `owner` is known to make."""
    row = await conn.fetchrow(
        """
        select * from export
        where owner is not null and lease_expire_time < now()
          and not (owner = $1 and id = any($2::text[]))
        order by lease_expire_time limit 1 for update skip locked
        """,
        owner,
        list(made),
    )
    return from_row(row) if row else None


async def update_state(
    conn: Connection,
    export: Export,
    target: State,
    *,
    made: export_pb2.Export | None = None,
    failure: Failure | None = None,
    gives_back: bool = False,
) -> Export | None:
    """Moves an export to `target`, if the graph allows it and its attempt is the current one.

    Args:
        conn: Connection inside a transaction.
        export: As it was claimed.
        target: SUCCEEDED, FAILED or QUEUED.
        made: For SUCCEEDED: the object and the differences.
        failure: Why it failed, or is to be begun again.
        gives_back: The attempt does not count: its process shuts down.

    Returns:
        The export after the change; None if it is elsewhere, or in another attempt.
    """
    row = await conn.fetchrow(
        """
        update export set state = $2, revision = revision + 1, failure = $6, object = $7,
          max_box_difference_px = $8, max_confidence_difference = $9,
          attempt = attempt - case when $10 then 1 else 0 end,
          owner = null, lease_expire_time = null,
          end_time = case when $2 = any($11) then now() end
        where id = $1 and state = any($3) and attempt = $4 and owner = $5
        returning *
        """,
        export.id,
        target,
        sources_of(target),
        export.attempt,
        export.owner,
        failure.SerializeToString() if failure else None,
        made.object.SerializeToString() if made else None,
        made.max_box_difference_px if made else 0.0,
        made.max_confidence_difference if made else 0.0,
        gives_back,
        list(FINAL),
    )
    return await _announce(conn, row)


async def cancel_export(conn: Connection, export_id: str) -> Export | None:
    """Cancels an export that is not finished; its owner, if it has one, ends the job then."""
    row = await conn.fetchrow(
        """
        update export set state = 'CANCELLED', revision = revision + 1, end_time = now(),
          failure = null, owner = null, lease_expire_time = null
        where id = $1 and state = any($2) and not deleted
        returning *
        """,
        export_id,
        sources_of(State.CANCELLED),
    )
    return await _announce(conn, row)


async def update_deleted(conn: Connection, export_id: str) -> bool:
    """Hides a finished export for good; `delete_export` follows when its objects are gone."""
    row = await conn.fetchrow(
        "update export set deleted = true where id = $1 and state = any($2) and not deleted"
        " returning id",
        export_id,
        list(FINAL),
    )
    return row is not None


async def list_deleted(conn: Connection) -> list[Export]:
    """Reads deleted exports whose objects may still be there."""
    rows = await conn.fetch("select * from export where deleted order by id limit 100")
    return [from_row(row) for row in rows]


async def delete_export(conn: Connection, export_id: str) -> None:
    """Forgets a deleted export."""
    await conn.execute("delete from export where id = $1 and deleted", export_id)
