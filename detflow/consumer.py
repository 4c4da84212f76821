"""Durable consumers of a stream: each event's effect happens once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from prometheus_client import Counter, Gauge

from detflow import faults, telemetry
from detflow.errors import DetflowError, Unavailable
from detflow.events import (
    FETCH_SECONDS,
    REQUEST_SECONDS,
    Bus,
    Delivered,
    Header,
    TooEarly,
    delivered,
    ended,
    fetch,
    identify,
    resource_of,
    translate,
)
from detflow.postgres import Connection, Database

log = telemetry.get_logger(__name__)

_PENDING = Gauge("detflow_consumer_pending", "Events a consumer has not had yet", ["consumer"])
_EVENTS = Counter(
    "detflow_events", "Events a consumer was given, by what came of it", ["consumer", "outcome"]
)
_DEAD_LETTERS = Counter("detflow_dead_letters", "Events that were put aside", ["consumer"])
_ACK_WAIT_SECONDS = 5.0  # how late a message comes again after its consumer was killed
_MAX_ATTEMPTS = 5

T = TypeVar("T")

AfterCommit: TypeAlias = Callable[[], Awaitable[None]]
Handler: TypeAlias = Callable[[Connection, Delivered[T]], Awaitable[AfterCommit | None]]


class Consumer(Generic[T]):
    """A durable consumer: each event's effect is committed exactly once, then acknowledged.

    The inbox row is written in the handler's transaction, so a redelivery finds it and does
    nothing. An event whose handler keeps failing goes to detflow.dead.{consumer} after five
    attempts, counted in Postgres; `list_dead` tells those that build on it.

    Args:
        bus: Connection.
        db: Database of the service.
        name: Durable name, unique in the deployment.
        stream: Stream to read.
        subjects: Filters.
        decode: Parses a payload.
        handle: Applies an event inside the transaction; it may return a function to await after the
            commit. It raises TooEarly to have the event again later.
    """

    def __init__(
        self,
        bus: Bus,
        db: Database,
        *,
        name: str,
        stream: str,
        subjects: Sequence[str],
        decode: Callable[[bytes], T],
        handle: Handler[T],
    ) -> None:
        self._bus = bus
        self._db = db
        self._name = name
        self._stream = stream
        self._subjects = list(subjects)
        self._decode = decode
        self._handle = handle
        _DEAD_LETTERS.labels(name)  # from the start, so that the first one is an increase

    async def run(self) -> None:
        """Consumes forever; reconnects by itself."""
        while True:
            # What is requested while NATS is away is sent at the reconnect: its message would
            # reach nobody, and come again only once its acknowledgement is overdue.
            await self._bus.wait_until_connected()
            try:
                async with self._subscribe() as subscription:
                    generation = self._bus.generation
                    while self._bus.connected and generation == self._bus.generation:
                        messages = await fetch(subscription)
                        for msg in messages:
                            _PENDING.labels(self._name).set(msg.metadata.num_pending)
                            await self._process(msg)
                        if not messages:
                            _PENDING.labels(self._name).set(0)
            except Unavailable as error:
                log.warning("consumer waits", consumer=self._name, error=str(error))
                await asyncio.sleep(FETCH_SECONDS)

    @contextlib.asynccontextmanager
    async def _subscribe(self) -> AsyncIterator[JetStreamContext.PullSubscription]:
        await self._bus.ensure_streams()
        config = ConsumerConfig(
            durable_name=self._name,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=_ACK_WAIT_SECONDS,
            filter_subjects=self._subjects,
            max_ack_pending=256,
        )
        with translate():
            # Creating it again with the same configuration changes nothing.
            await self._bus.js.add_consumer(self._stream, config)
            subscription = await self._bus.js.pull_subscribe_bind(self._name, self._stream)
        async with ended(subscription):
            yield subscription

    async def _process(self, msg: Msg) -> None:
        event_id = identify(msg)
        try:
            event = delivered(msg, self._decode)
            with telemetry.span(f"consume {self._name}", event.carrier):
                await self._apply(event)
        except TooEarly:
            self._count("early")
            await self._settle(msg.nak(delay=0.1))
        except Unavailable as error:
            self._count("unavailable")
            log.warning("event waits", consumer=self._name, event_id=event_id, error=str(error))
            await self._settle(msg.nak(delay=1.0))
        except Exception as error:
            self._count("failed")
            await self._on_failure(msg, event_id, error)
        else:
            self._count("applied")
            faults.point("consumer.before_ack")
            await self._settle(msg.ack_sync(timeout=REQUEST_SECONDS))
            faults.point("consumer.after_ack")

    def _count(self, outcome: str) -> None:
        _EVENTS.labels(self._name, outcome).inc()

    async def _apply(self, event: Delivered[T]) -> None:
        after: AfterCommit | None = None
        async with self._db.transaction() as conn:
            inserted = await conn.fetchval(
                "insert into inbox (consumer, event_id) values ($1, $2)"
                " on conflict do nothing returning true",
                self._name,
                event.event_id,
            )
            if inserted:
                after = await self._handle(conn, event)
        if after is not None:
            await after()

    async def _on_failure(self, msg: Msg, event_id: str, error: Exception) -> None:
        """Counts a failed delivery; the last one is put aside so that later events flow."""
        async with self._db.transaction() as conn:
            attempts: int = await conn.fetchval(
                """
                insert into inbox_failure (consumer, event_id, attempts, error, resource)
                values ($1, $2, 1, $3, $4)
                on conflict (consumer, event_id)
                do update set attempts = inbox_failure.attempts + 1, error = excluded.error
                returning attempts
                """,
                self._name,
                event_id,
                repr(error)[:1000],
                resource_of(msg.subject),
            )
        log.error(
            "event failed",
            consumer=self._name,
            event_id=event_id,
            subject=msg.subject,
            attempts=attempts,
            exc_info=not isinstance(error, DetflowError),
        )
        if attempts < _MAX_ATTEMPTS:
            await self._settle(msg.nak(delay=min(2.0**attempts * 0.1, 5.0)))
            return
        headers = {k: v for k, v in (msg.headers or {}).items() if not k.startswith("Nats-")}
        await self._bus.publish_durable(
            f"detflow.dead.{self._name}",
            msg.data,
            headers
            | {
                Header.EVENT_ID: f"dead/{self._name}/{event_id}",
                "detflow-subject": msg.subject,
                "detflow-error": type(error).__name__,
            },
        )
        _DEAD_LETTERS.labels(self._name).inc()
        await self._settle(msg.ack_sync(timeout=REQUEST_SECONDS))

    async def _settle(self, acknowledgement: Awaitable[Any]) -> None:
        """Acknowledges; if that is lost the event comes again and the inbox knows it."""
        with translate():
            await acknowledgement


async def list_dead(conn: Connection, consumer: str, resource: str) -> Sequence[str]:
    """Returns the ids of a resource's events that a consumer has put aside.

    Events that build on them would wait for ever: whoever would raise TooEarly asks this first.

    Args:
        conn: Connection.
        consumer: Durable name.
        resource: "kind.id", as `Delivered.resource`.
    """
    rows = await conn.fetch(
        "select event_id from inbox_failure"
        " where consumer = $1 and resource = $2 and attempts >= $3",
        consumer,
        resource,
        _MAX_ATTEMPTS,
    )
    return [row["event_id"] for row in rows]
