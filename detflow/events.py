"""NATS: the connection, the streams, and how they are read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RawStreamMsg, StreamConfig

from detflow import telemetry
from detflow.errors import Unavailable

log = telemetry.get_logger(__name__)

EVENTS_STREAM = "DETFLOW_EVENTS"
RECORDS_STREAM = "DETFLOW_RECORDS"
DEAD_STREAM = "DETFLOW_DEAD"

_DAY_SECONDS = 86_400.0
_STREAMS = {
    EVENTS_STREAM: StreamConfig(
        name=EVENTS_STREAM, subjects=["detflow.v1.>"], max_age=30 * _DAY_SECONDS
    ),
    RECORDS_STREAM: StreamConfig(
        name=RECORDS_STREAM, subjects=["detflow.records.>"], max_age=7 * _DAY_SECONDS
    ),
    DEAD_STREAM: StreamConfig(
        name=DEAD_STREAM, subjects=["detflow.dead.>"], max_age=30 * _DAY_SECONDS
    ),
}
_CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 2.0
FETCH_SECONDS = 1.0  # a pending fetch does not wake after a server restart, so it must be short

T = TypeVar("T")


class Header:
    """Header names that are read again; the others are CloudEvents for outside readers."""

    EVENT_ID = "Nats-Msg-Id"
    SEQ = "detflow-seq"
    NAME = "ce-subject"


class TooEarly(Exception):
    """An event came before one it builds on: deliver it again later."""


class Bus:
    """One NATS connection; it reconnects forever, calls meanwhile raise Unavailable."""

    def __init__(self, events_bytes: int | None = None) -> None:
        self._events_bytes = -1 if events_bytes == 0 else events_bytes  # NATS' word for no limit
        self._nc = Client()
        self._epochs: dict[str, str] = {}
        self._up = asyncio.Event()
        self.generation = 0  # increases with every reconnect

    @classmethod
    async def connect(cls, url: str, name: str, *, events_bytes: int | None = None) -> Bus:
        """Connects.

        Args:
            url: nats:// URL, or several separated by commas.
            name: Name of this client, shown by the server's monitoring.
            events_bytes: How large the event stream may become; 0 sets no limit, None leaves what
                is set.

        Raises:
            Unavailable: NATS does not answer.
        """
        bus = cls(events_bytes)
        try:
            # A client that reconnects forever also begins forever: the beginning is limited here.
            async with asyncio.timeout(_CONNECT_SECONDS):
                await bus._nc.connect(
                    url.split(","),
                    name=name,
                    connect_timeout=5,
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type]  # seconds; fractions work
                    ping_interval=1.5,  # type: ignore[arg-type]  # so a black hole shows in 4.5 s
                    max_outstanding_pings=2,
                    pending_size=16 << 20,
                    error_cb=bus._on_error,
                    disconnected_cb=bus._on_disconnect,
                    reconnected_cb=bus._on_reconnect,
                )
        except (nats.errors.Error, OSError, TimeoutError) as error:
            await bus._nc.close()
            raise Unavailable("cannot connect to NATS; check DETFLOW_NATS_URL") from error
        bus._up.set()
        return bus

    @property
    def connected(self) -> bool:
        """Whether the connection is up now."""
        return bool(self._nc.is_connected)

    async def wait_until_connected(self) -> None:
        """Waits for the connection, if it is away."""
        await self._up.wait()

    @property
    def js(self) -> JetStreamContext:
        """JetStream on this connection."""
        return self._nc.jetstream(timeout=REQUEST_SECONDS)

    async def close(self) -> None:
        """Closes the connection at once."""
        await self._nc.close()

    async def ensure_streams(self) -> None:
        """Creates the streams that are not there, and bounds that of the events as it is set."""
        with translate():
            for name, config in _STREAMS.items():
                bound = self._events_bytes if name == EVENTS_STREAM else None
                if bound is not None:
                    config = replace(config, max_bytes=bound)
                try:
                    found = (await self.js.stream_info(name)).config
                except nats.js.errors.NotFoundError:
                    await self.js.add_stream(config)
                    log.info("stream created", stream=name)
                    continue
                if bound is not None and (found.max_bytes or -1) != bound:
                    await self.js.update_stream(replace(found, max_bytes=bound))
                    log.info("stream bounded", stream=name, max_bytes=bound)

    async def publish(self, subject: str, payload: bytes) -> None:
        """Publishes on core NATS: whoever listens now gets it."""
        with translate():
            await self._nc.publish(subject, payload)

    async def publish_durable(
        self, subject: str, payload: bytes, headers: Mapping[str, str]
    ) -> None:
        """Publishes on JetStream and waits until it is stored.

        Raises:
            Unavailable: The outcome is unknown; repeat with the same Nats-Msg-Id.
        """
        try:
            with translate():
                await self.js.publish(subject, payload, headers=dict(headers))
        except Unavailable:
            if self.connected:
                await self.ensure_streams()
            raise

    async def request(self, subject: str, payload: bytes, seconds: float) -> bytes:
        """Asks whoever answers `subject` and waits at most `seconds`."""
        with translate():
            reply = await self._nc.request(subject, payload, timeout=seconds)
            return bytes(reply.data)

    async def subscribe(
        self, subject: str, callback: Callable[[Msg], Awaitable[None]], queue: str = ""
    ) -> Subscription:
        """Calls back for every core NATS message on `subject`, now and after reconnects."""
        with translate():
            return await self._nc.subscribe(subject, queue=queue, cb=callback)

    async def stream_epoch(self, stream: str, *, fresh: bool = False) -> str:
        """Returns what tells a stream from one made anew after its store was wiped."""
        if fresh or stream not in self._epochs:
            await self.ensure_streams()
            with translate():
                info = await self.js.stream_info(stream)
            self._epochs[stream] = f"{info.created.timestamp():.6f}" if info.created else "0"
        return self._epochs[stream]

    async def stream_bounds(self, stream: str) -> tuple[int, int]:
        """Returns the first and the last sequence number in a stream."""
        with translate():
            state = (await self.js.stream_info(stream)).state
        return state.first_seq, state.last_seq

    async def last_message(self, stream: str, subject: str) -> RawStreamMsg | None:
        """Returns the last message on a subject (wildcards allowed), if the stream has one."""
        with translate():
            try:
                return await self.js.get_last_msg(stream, subject)
            except nats.js.errors.NotFoundError:
                return None

    async def last_seq(self, subject: str) -> int:
        """Returns the detflow-seq of the last event on a subject (wildcards allowed), else 0."""
        message = await self.last_message(EVENTS_STREAM, subject)
        return int((message.headers or {}).get(Header.SEQ, "0")) if message else 0

    async def _on_error(self, error: Exception) -> None:
        log.warning("nats", error=repr(error))

    async def _on_disconnect(self) -> None:
        self._up.clear()
        if not self._nc.is_closed:
            log.warning("nats disconnected")

    async def _on_reconnect(self) -> None:
        self.generation += 1
        self._epochs.clear()
        self._up.set()
        log.info("nats reconnected")


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered(Generic[T]):
    """A message from a stream.

    Attributes:
        event_id: Identity for de-duplication.
        subject: Full subject.
        kind: Kind of resource, e.g. "training".
        resource_id: Id of the resource.
        what: What happened, e.g. "state_changed".
        name: Resource name.
        seq: Position among this resource's events; 0 for records, which carry their own.
        stream_seq: Position in the stream.
        message: Decoded payload.
        carrier: Headers, with the traceparent.
    """

    event_id: str
    subject: str
    kind: str
    resource_id: str
    what: str
    name: str
    seq: int
    stream_seq: int
    message: T
    carrier: Mapping[str, str]

    @property
    def resource(self) -> str:
        """What the event is of: "kind.id"; of a record, training and attempt."""
        return resource_of(self.subject)


def delivered(msg: Msg, decode: Callable[[bytes], T]) -> Delivered[T]:
    """Reads a JetStream message."""
    headers = msg.headers or {}
    _, _, kind, resource_id, what = [*msg.subject.split("."), "", "", "", ""][:5]
    return Delivered(
        event_id=identify(msg),
        subject=msg.subject,
        kind=kind,
        resource_id=resource_id,
        what=what,
        name=headers.get(Header.NAME, ""),
        seq=int(headers.get(Header.SEQ, "0")),
        stream_seq=msg.metadata.sequence.stream,
        message=decode(msg.data),
        carrier=headers,
    )


def resource_of(subject: str) -> str:
    """Returns the part of a subject that names the resource."""
    return ".".join(subject.split(".")[2:4])


def identify(msg: Msg) -> str:
    """Returns a message's identity; one that brings none is known by its place in the stream."""
    sequence = msg.metadata.sequence.stream
    return (msg.headers or {}).get(Header.EVENT_ID) or f"{msg.metadata.stream}/{sequence}"


async def fetch(subscription: JetStreamContext.PullSubscription) -> list[Msg]:
    """Fetches the next message, or none after a second.

    One at a time: a larger batch would hold its first message back until the batch is full or the
    time is over.

    Raises:
        Unavailable: The consumer or the server is gone.
    """
    try:
        with translate(timeout_is_error=False):
            return list(await subscription.fetch(1, timeout=FETCH_SECONDS))
    except TimeoutError:
        return []


async def num_pending(subscription: JetStreamContext.PullSubscription) -> int:
    """Returns how many messages the stream holds that were not fetched yet.

    Raises:
        Unavailable: NATS is away.
    """
    with translate():
        return (await subscription.consumer_info()).num_pending or 0


@contextlib.asynccontextmanager
async def subscribe_from(
    bus: Bus, stream: str, subjects: Sequence[str], start_seq: int
) -> AsyncIterator[JetStreamContext.PullSubscription]:
    """Reads a stream from a position on, for this process only; nothing is acknowledged.

    Raises:
        Unavailable: NATS is away.
    """
    config = ConsumerConfig(
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=max(start_seq, 1),
        ack_policy=AckPolicy.NONE,
        filter_subjects=list(subjects),
        mem_storage=True,
        inactive_threshold=30.0,
    )
    with translate():
        subscription = await bus.js.pull_subscribe("", stream=stream, config=config)
    async with ended(subscription):
        yield subscription


@contextlib.asynccontextmanager
async def ended(subscription: JetStreamContext.PullSubscription) -> AsyncIterator[None]:
    """Ends a subscription with its use: the client would keep it through every reconnect."""
    try:
        yield
    finally:
        with contextlib.suppress(nats.errors.Error):  # it ended with its connection
            await subscription.unsubscribe()


@contextlib.contextmanager
def translate(*, timeout_is_error: bool = True) -> Iterator[None]:
    """Turns the many ways of NATS being away into Unavailable."""
    try:
        yield
    except TimeoutError as error:
        if not timeout_is_error:
            raise
        raise Unavailable("NATS did not answer in time; retry") from error
    except (nats.errors.Error, OSError) as error:
        raise Unavailable("NATS is away for the moment; retry") from error
