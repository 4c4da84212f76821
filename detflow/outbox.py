"""The transactional outbox: events committed with their state change, published by one relay."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Sequence

import asyncpg

from detflow import faults, telemetry
from detflow.errors import Unavailable
from detflow.events import EVENTS_STREAM, Bus, Header
from detflow.postgres import CONNECTION_TROUBLE, Connection, Database
from detflow.tasks import wait
from detflow.v1 import events_pb2

log = telemetry.get_logger(__name__)

_CHANNEL = "outbox"
_RELAY_LOCK = (
    0x72656C61  # "rela"; advisory locks are per database, so the schema is hashed in beside it
)
_POLL_SECONDS = 1.0
_SILENT_SECONDS = 10  # after which a relay counts as gone; it asks something every second
_BATCH = 500
_MAX_REMEMBERED = 10_000  # resources whose last published position is kept at hand
_HOUSEKEEPING_SECONDS = 3600.0


async def append(
    conn: Connection,
    *,
    kind: str,
    resource_id: str,
    what: str,
    name: str,
    event: events_pb2.Event,
) -> int:
    """Records an event in the caller's transaction.

    Args:
        conn: Connection inside the transaction that makes the change.
        kind: Kind of resource in the subject, e.g. "training".
        resource_id: Id of the resource in the subject.
        what: What happened, e.g. "state_changed".
        name: Resource name, for ce-subject.
        event: Payload.

    Returns:
        The event's position among this resource's events, from 1.
    """
    carrier: dict[str, str] = {}
    telemetry.inject(carrier)
    resource = f"{kind}.{resource_id}"
    seq: int = await conn.fetchval(
        """
        with next as (
          insert into outbox_seq (resource, seq) values ($1, 1)
          on conflict (resource) do update set seq = outbox_seq.seq + 1
          returning seq
        ), appended as (
          insert into outbox (event_id, resource, seq, subject, name, payload, traceparent)
          select $2, $1, seq, $3, $4, $5, $6 from next returning seq
        )
        select seq, pg_notify($7, '') from appended
        """,
        resource,
        str(uuid.uuid4()),
        f"detflow.v1.{resource}.{what}",
        name,
        event.SerializeToString(deterministic=True),
        carrier.get("traceparent", ""),
        _CHANNEL,
    )
    return seq


class Seqs(dict[str, int]):
    """Last sequence number per resource ("kind.id").

    Attributes:
        waiting: Resources whose last event may not be in the stream yet.
    """

    waiting: frozenset[str] = frozenset()


async def last_seqs(conn: Connection, resources: Sequence[str]) -> Seqs:
    """Returns the last sequence number of each resource ("kind.id") that has events."""
    rows = await conn.fetch(
        """
        select s.resource, s.seq, o.seq is not null and o.publish_time is null as waiting
        from outbox_seq s left join outbox o on o.resource = s.resource and o.seq = s.seq
        where s.resource = any($1::text[])
        """,
        list(resources),
    )
    seqs = Seqs((row["resource"], row["seq"]) for row in rows)
    seqs.waiting = frozenset(row["resource"] for row in rows if row["waiting"])
    return seqs


async def last_carrier(conn: Connection, resource: str) -> dict[str, str]:
    """Returns the carrier of the trace in which a resource ("kind.id") was changed last.

    Empty if that was longer ago than events are kept, or in no trace.
    """
    traceparent = await conn.fetchval(
        "select traceparent from outbox where resource = $1 and traceparent <> ''"
        " order by seq desc limit 1",
        resource,
    )
    return {"traceparent": traceparent} if traceparent else {}


class Relay:
    """Publishes a service's outbox, in order per resource, exactly once as its readers see it.

    One relay per service runs at a time (session advisory lock). A publish whose outcome is unknown
    is repeated with the same event id; after a restart the last sequence number in the stream says
    what is there already, so this does not depend on the stream's de-duplication window.
    """

    def __init__(self, db: Database, bus: Bus, source: str) -> None:
        self._db = db
        self._bus = bus
        self._source = source
        self._next_housekeeping = 0.0
        self._published: dict[str, int] = {}  # resource -> last seq known to be in the stream

    async def run(self) -> None:
        """Relays forever; reconnects by itself."""
        while True:
            try:
                conn = await self._db.listen()
                try:
                    await self._relay_on(conn)
                finally:
                    conn.terminate()
            except CONNECTION_TROUBLE as error:
                log.warning("relay waits for the database", error=str(error))
                await asyncio.sleep(_POLL_SECONDS)

    async def _relay_on(self, conn: asyncpg.Connection[asyncpg.Record]) -> None:
        wake = asyncio.Event()
        conn.add_termination_listener(lambda *_: wake.set())
        await conn.add_listener(_CHANNEL, lambda *_: wake.set())
        # A relay that is frozen, or cut off, must not keep the lock from those that run.
        await conn.execute(f"set idle_session_timeout = '{_SILENT_SECONDS}s'")
        while not await conn.fetchval(
            "select pg_try_advisory_lock(hashtext($1), $2)", self._db.schema, _RELAY_LOCK
        ):
            await wait(wake, _POLL_SECONDS)
        self._published.clear()  # whoever had the lock meanwhile has published more
        while True:
            wake.clear()
            if not await self._publish_batch(conn):
                await wait(wake, _POLL_SECONDS)

    async def _publish_batch(self, conn: asyncpg.Connection[asyncpg.Record]) -> bool:
        """Publishes what is there; returns whether there may be more."""
        if not self._bus.connected:
            await conn.execute("select 1")  # keeps the lock
            return False
        if len(self._published) > _MAX_REMEMBERED:
            self._published.clear()
        try:
            await self._follow_stream(conn)
            rows = await conn.fetch(
                "select * from outbox where publish_time is null order by position limit $1", _BATCH
            )
            by_resource: dict[str, list[asyncpg.Record]] = defaultdict(list)
            for row in rows:
                by_resource[row["resource"]].append(row)
            results = await asyncio.gather(
                *(self._publish_resource(r, rows) for r, rows in by_resource.items())
            )
        except Unavailable as error:
            log.warning("relay waits for NATS", error=str(error))
            self._published.clear()
            return False
        done = [position for positions in results for position in positions]
        if done:
            await conn.execute(
                "update outbox set publish_time = now() where position = any($1::bigint[])", done
            )
        if len(done) < len(rows):
            self._published.clear()
            return False
        if not rows:
            await self._forget_old(conn)
        return len(rows) == _BATCH

    async def _forget_old(self, conn: asyncpg.Connection[asyncpg.Record]) -> None:
        """Drops what no replay needs any more; the inbox is kept longer than any outbox."""
        now = asyncio.get_running_loop().time()
        if now < self._next_housekeeping:
            return
        self._next_housekeeping = now + _HOUSEKEEPING_SECONDS
        await conn.execute("delete from outbox where publish_time < now() - interval '7 days'")
        await conn.execute("delete from inbox where receive_time < now() - interval '30 days'")
        # Each call that changes something is a resource of its own, after which nothing comes.
        await conn.execute(
            "delete from outbox_seq s where resource like 'audit.%'"
            " and not exists (select from outbox o where o.resource = s.resource)"
        )

    async def _follow_stream(self, conn: asyncpg.Connection[asyncpg.Record]) -> None:
        """Publishes everything retained again if the stream was wiped and made anew."""
        stream = await self._bus.stream_epoch(EVENTS_STREAM)
        if await conn.fetchval("select stream from relay") == stream:
            return
        async with conn.transaction():
            await conn.execute(
                "insert into relay (stream) values ($1)"
                " on conflict (only_row) do update set stream = excluded.stream",
                stream,
            )
            await conn.execute(
                "update outbox set publish_time = null where publish_time is not null"
            )
        self._published.clear()

    async def _publish_resource(self, resource: str, rows: list[asyncpg.Record]) -> list[int]:
        """Publishes one resource's events in order; returns the positions now in the stream."""
        done: list[int] = []
        if resource not in self._published:
            try:
                self._published[resource] = await self._bus.last_seq(f"detflow.v1.{resource}.>")
            except Unavailable:
                return done
        for row in rows:
            if row["seq"] > self._published[resource]:
                if not await self._publish(row):
                    break
                self._published[resource] = row["seq"]
            done.append(row["position"])
        return done

    async def _publish(self, row: asyncpg.Record) -> bool:
        headers = {
            Header.EVENT_ID: row["event_id"],
            Header.SEQ: str(row["seq"]),
            "ce-specversion": "1.0",
            "ce-id": row["event_id"],
            "ce-source": self._source,
            "ce-type": row["subject"].rsplit(".", 1)[1],
            "ce-time": row["create_time"].isoformat(),
            Header.NAME: row["name"],
            "datacontenttype": "application/protobuf",
        }
        if row["traceparent"]:
            headers["traceparent"] = row["traceparent"]
        try:
            faults.point("outbox.before_publish")
            await self._bus.publish_durable(row["subject"], row["payload"], headers)
            faults.point("outbox.after_publish")
        except Unavailable:
            return False
        return True
