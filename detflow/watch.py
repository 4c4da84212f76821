"""Watches: a snapshot, then every change exactly once, resumable by cursor.

One subscription to the event stream per process fans out to all its watchers. A cursor is a
position in that stream, so a reconnecting watcher gets the exact suffix from any replica. Progress
("gauges") comes over core NATS: only the newest value matters, so it is conflated per watcher and
not replayed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias, TypeVar

import prometheus_client
from google.protobuf.message import DecodeError
from nats.aio.msg import Msg

from detflow import telemetry
from detflow.errors import InvalidArgument, OutOfRange, ResourceExhausted, Unavailable, Violation
from detflow.events import (
    EVENTS_STREAM,
    Bus,
    delivered,
    fetch,
    num_pending,
    subscribe_from,
)
from detflow.outbox import Seqs
from detflow.tasks import wait
from detflow.v1 import events_pb2

log = telemetry.get_logger(__name__)

_WATCHERS = prometheus_client.Gauge("detflow_watchers", "Open watches of this process")

T = TypeVar("T")

HEARTBEAT_SECONDS = 15.0
_GAUGE_INTERVAL_SECONDS = 0.1
_READY_SECONDS = 10.0
_MAX_PENDING = 1000
_SETTLE_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 0.05
_PROGRESS_SUBJECT = "detflow.progress.>"


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[T]):
    """The state at the beginning.

    Attributes:
        value: What the servicer read, in one transaction.
        seqs: Last event ("kind.id" -> seq) whose effect `value` has; later ones follow as changes.
        cursor: Set by the watcher.
    """

    value: T
    seqs: Mapping[str, int]
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """An event of a watched resource."""

    cursor: str
    subject: str
    kind: str
    resource_id: str
    what: str
    seq: int
    event: events_pb2.Event
    stream_seq: int


@dataclass(frozen=True, slots=True)
class Gauge:
    """The newest progress; `payload` is the serialized message."""

    cursor: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Beat:
    """Nothing happened for a while."""

    cursor: str


Item: TypeAlias = Snapshot[T] | Change | Gauge | Beat


class _Mailbox:
    """What waits for one watcher: changes in order, and the newest gauge."""

    def __init__(self, subjects: Sequence[str], progress_subject: str | None) -> None:
        self.subjects = [subject.split(".") for subject in subjects]
        self.progress_subject = progress_subject
        self.changes: deque[Change] = deque()
        self.gauge: bytes | None = None
        self.error: Exception | None = None
        self.wake = asyncio.Event()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.wake.set()


class Watcher:
    """Fans the event stream out to the watchers of this process."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._mailboxes: set[_Mailbox] = set()
        self._epoch = ""
        self._position = 0  # stream position up to which everything was fanned out
        self._ready = asyncio.Event()
        self._moved = asyncio.Event()  # set, and replaced, when the position moves
        self._closed = False

    async def run(self) -> None:
        """Reads the stream forever; reconnects by itself."""
        await self._bus.subscribe(_PROGRESS_SUBJECT, self._on_progress)
        while True:
            generation = self._bus.generation
            try:
                await self._attach()
                async with subscribe_from(
                    self._bus, EVENTS_STREAM, ["detflow.v1.>"], self._position + 1
                ) as subscription:
                    self._ready.set()
                    while generation == self._bus.generation:
                        for msg in await fetch(subscription):
                            if change := _change(msg, self._epoch):
                                self._dispatch(change)
                            self._advance(msg.metadata.sequence.stream)
            except Unavailable as error:
                log.warning("watches wait", error=str(error))
                await asyncio.sleep(1.0)

    def close(self) -> None:
        """Ends every watch for the drain; clients reconnect elsewhere with their cursor."""
        self._closed = True
        for mailbox in self._mailboxes:
            mailbox.fail(Unavailable("the server is shutting down; reconnect with your cursor"))

    async def follow(
        self,
        *,
        subjects: Sequence[str],
        cursor: str,
        snapshot: Callable[[], Awaitable[Snapshot[T]]],
        matches: Callable[[Change], bool] = lambda change: True,
        progress_subject: str | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> AsyncGenerator[Item[T], None]:
        """Watches resources.

        Args:
            subjects: Event subjects, with `*` for one token and `>` for the rest.
            cursor: Empty for a snapshot first; else the cursor of the last item seen.
            snapshot: Reads the state.
            matches: Further filter.
            progress_subject: Core NATS subject of the gauge.
            heartbeat_seconds: Longest silence.

        Yields:
            The snapshot (only if there was no cursor), then changes, gauges and beats, without end.

        Raises:
            InvalidArgument: BAD_CURSOR.
            OutOfRange: CURSOR_EXPIRED: the events after the cursor are not kept any more.
            ResourceExhausted: SLOW_WATCHER: this watcher does not keep up.
            Unavailable: The server is shutting down.
        """
        resume = _decode_cursor(cursor) if cursor else None
        if self._closed:
            raise Unavailable("the server is shutting down; reconnect with your cursor")
        if not await wait(self._ready, _READY_SECONDS):
            raise Unavailable("the event stream is away for the moment; retry")
        mailbox = _Mailbox(subjects, progress_subject)
        self._mailboxes.add(mailbox)
        _WATCHERS.inc()
        try:
            position = self._position  # everything after it reaches the mailbox
            seqs: Mapping[str, int] = {}
            seen = 0
            if resume is None:
                first, position = await self._settle(mailbox, snapshot, matches, position)
                seqs = first.seqs
                cursor = _encode_cursor(self._epoch, position)
                yield replace(first, cursor=cursor)
            else:
                epoch, seen = resume
                replay = self._replay(epoch, seen, position, subjects)
                async with contextlib.aclosing(replay) as changes:
                    async for change in changes:
                        if matches(change):
                            cursor = change.cursor
                            yield change
            async for item in self._live(mailbox, cursor, heartbeat_seconds):
                if isinstance(item, Change) and (
                    item.stream_seq <= seen  # the cursor came from a replica that was ahead
                    or item.seq <= seqs.get(f"{item.kind}.{item.resource_id}", 0)
                    or not matches(item)
                ):
                    continue
                yield item
        finally:
            self._mailboxes.discard(mailbox)
            _WATCHERS.dec()

    async def _settle(
        self,
        mailbox: _Mailbox,
        snapshot: Callable[[], Awaitable[Snapshot[T]]],
        matches: Callable[[Change], bool],
        position: int,
    ) -> tuple[Snapshot[T], int]:
        """Takes a snapshot and the stream position that divides it from what follows.

        An event may be committed, and so in the snapshot, before it is in the stream; so this
        waits, a second at most, until everything the snapshot has is there. After that second
        (NATS is slow or away) a watcher that resumes from the snapshot's cursor may see changes
        again that the snapshot had.
        """
        first = await snapshot()
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                while not await self._has_arrived(mailbox, first):
                    first = await snapshot()
        except TimeoutError:
            return first, position
        changes = [change for change in mailbox.changes if matches(change)]
        is_known = [c.seq <= first.seqs.get(f"{c.kind}.{c.resource_id}", 0) for c in changes]
        num_known = is_known.index(False) if False in is_known else len(is_known)
        return first, changes[num_known - 1].stream_seq if num_known else position

    async def _has_arrived(self, mailbox: _Mailbox, first: Snapshot[T]) -> bool:
        """Waits for what a snapshot has; False means it may not be there: look again."""
        _, last = await self._bus.stream_bounds(EVENTS_STREAM)
        while self._position < last:
            await self._moved.wait()
        arrived = {f"{c.kind}.{c.resource_id}": c.seq for c in mailbox.changes}
        waiting = first.seqs.waiting if isinstance(first.seqs, Seqs) else ()
        if all(arrived.get(resource, 0) >= first.seqs[resource] for resource in waiting):
            return True
        await wait(self._moved, _LOOK_AGAIN_SECONDS)
        return False

    async def _attach(self) -> None:
        """Finds where to go on; if the stream was made anew, every cursor is void."""
        epoch = await self._bus.stream_epoch(EVENTS_STREAM, fresh=True)
        first, last = await self._bus.stream_bounds(EVENTS_STREAM)
        if epoch != self._epoch:
            for mailbox in self._mailboxes:
                mailbox.fail(_expired())
            self._epoch, self._position = epoch, last
        elif self._position + 1 < first:
            for mailbox in self._mailboxes:
                mailbox.fail(_expired())
            self._position = last

    async def _replay(
        self, epoch: str, after: int, until: int, subjects: Sequence[str]
    ) -> AsyncGenerator[Change, None]:
        """Yields what the stream holds after a cursor, up to where the live part begins."""
        first, last = await self._bus.stream_bounds(EVENTS_STREAM)
        if epoch != self._epoch or after + 1 < first or after > last:
            raise _expired()
        if after >= until:
            return
        async with subscribe_from(self._bus, EVENTS_STREAM, subjects, after + 1) as subscription:
            pending = await num_pending(subscription)
            while pending > 0:
                for msg in await fetch(subscription):
                    pending = msg.metadata.num_pending
                    if msg.metadata.sequence.stream > until:
                        return
                    if change := _change(msg, self._epoch):
                        yield change

    async def _live(
        self, mailbox: _Mailbox, cursor: str, heartbeat_seconds: float
    ) -> AsyncIterator[Change | Gauge | Beat]:
        loop = asyncio.get_running_loop()
        next_gauge = 0.0
        while True:
            mailbox.wake.clear()
            while mailbox.changes:
                change = mailbox.changes.popleft()
                cursor = change.cursor
                yield change
            if mailbox.error:
                raise mailbox.error
            wait_seconds = heartbeat_seconds
            if mailbox.gauge is not None:
                wait_seconds = next_gauge - loop.time()
                if wait_seconds <= 0:
                    payload, mailbox.gauge = mailbox.gauge, None
                    next_gauge = loop.time() + _GAUGE_INTERVAL_SECONDS
                    yield Gauge(cursor, payload)
                    continue
            if mailbox.changes:
                continue
            if not await wait(mailbox.wake, wait_seconds) and mailbox.gauge is None:
                yield Beat(cursor)

    def _dispatch(self, change: Change) -> None:
        tokens = change.subject.split(".")
        for mailbox in self._mailboxes:
            # After a failure nothing more may be put in: it would come after a hole.
            if mailbox.error or not any(_covers(s, tokens) for s in mailbox.subjects):
                continue
            if len(mailbox.changes) >= _MAX_PENDING:
                last = mailbox.changes[0].cursor
                mailbox.fail(
                    ResourceExhausted(
                        "this watcher reads too slowly; reconnect with your last cursor",
                        reason="SLOW_WATCHER",
                        metadata={"oldest_undelivered": last},
                    )
                )
                continue
            mailbox.changes.append(change)
            mailbox.wake.set()

    def _advance(self, position: int) -> None:
        self._position = position
        self._moved.set()
        self._moved = asyncio.Event()

    async def _on_progress(self, msg: Msg) -> None:
        for mailbox in self._mailboxes:
            if mailbox.progress_subject == msg.subject:
                mailbox.gauge = msg.data
                mailbox.wake.set()


def _change(msg: Msg, epoch: str) -> Change | None:
    """Reads an event; None for one that is not readable, of which watchers learn nothing."""
    try:
        event = delivered(msg, events_pb2.Event.FromString)
    except DecodeError as error:
        log.error("event is not readable", subject=msg.subject, error=str(error))
        return None
    return Change(
        cursor=_encode_cursor(epoch, event.stream_seq),
        subject=event.subject,
        kind=event.kind,
        resource_id=event.resource_id,
        what=event.what,
        seq=event.seq,
        event=event.message,
        stream_seq=event.stream_seq,
    )


def _covers(pattern: Sequence[str], tokens: Sequence[str]) -> bool:
    """Says whether a NATS subject pattern covers a subject, both split at the dots."""
    if pattern[-1] == ">":
        return len(tokens) >= len(pattern) and _covers(pattern[:-1], tokens[: len(pattern) - 1])
    return len(pattern) == len(tokens) and all(
        p in ("*", t) for p, t in zip(pattern, tokens, strict=True)
    )


def _encode_cursor(epoch: str, position: int) -> str:
    return base64.urlsafe_b64encode(f"{epoch}/{position}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> tuple[str, int]:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        epoch, position = text.split("/")
        return epoch, int(position)
    except (binascii.Error, ValueError) as error:
        problem = "send the cursor of the last message as it was, or none to begin with a snapshot"
        raise InvalidArgument(
            f"cursor is not valid: {problem}",
            reason="BAD_CURSOR",
            violations=[Violation("cursor", "BAD_CURSOR", problem)],
        ) from error


def _expired() -> OutOfRange:
    return OutOfRange(
        "the events after this cursor are not kept any more; watch again without a cursor",
        reason="CURSOR_EXPIRED",
    )
