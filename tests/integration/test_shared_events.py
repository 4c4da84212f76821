"""Outbox, relay, consumer and watch, against real servers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import pytest

from detflow import outbox, watch
from detflow.consumer import Consumer, Handler
from detflow.errors import InvalidArgument, OutOfRange, ResourceExhausted
from detflow.events import EVENTS_STREAM, Bus, Delivered, Header, TooEarly
from detflow.outbox import Relay
from detflow.postgres import Connection, Database
from detflow.v1 import events_pb2, version_pb2
from detflow.watch import Beat, Change, Gauge, Item, Snapshot, Watcher
from tests.background import running

MakeDatabase = Callable[[str], Awaitable[Database]]
SUBJECTS = ["detflow.v1.version.*.>"]


async def append(db: Database, resource_id: str, name: str) -> int:
    async with db.transaction() as conn:
        return await outbox.append(
            conn,
            kind="version",
            resource_id=resource_id,
            what="updated",
            name=f"projects/p/versions/{resource_id}",
            event=events_pb2.Event(version=version_pb2.Version(display_name=name)),
        )


def consumer(
    bus: Bus, db: Database, handle: Handler[events_pb2.Event]
) -> Consumer[events_pb2.Event]:
    return Consumer(
        bus,
        db,
        name="test",
        stream=EVENTS_STREAM,
        subjects=SUBJECTS,
        decode=events_pb2.Event.FromString,
        handle=handle,
    )


def names(items: list[Item[str]]) -> list[str]:
    return [i.event.version.display_name for i in items if isinstance(i, Change)]


async def take(stream: AsyncIterator[Item[str]], count: int) -> list[Item[str]]:
    async with asyncio.timeout(10):
        return [await anext(stream) for _ in range(count)]


async def nothing() -> Snapshot[str]:
    return Snapshot("empty", {})


async def test_events_reach_a_consumer_once_and_in_order(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    seen: list[tuple[str, int]] = []
    done = asyncio.Event()

    async def handle(conn: Connection, event: Delivered[events_pb2.Event]) -> None:
        seen.append((event.resource_id, event.seq))
        if len(seen) == 40:
            done.set()

    async with running(Relay(db, bus, "test").run(), consumer(bus, db, handle).run()):
        await asyncio.gather(*(append(db, "ab"[n % 2], str(n)) for n in range(40)))
        async with asyncio.timeout(20):
            await done.wait()
    assert [s for r, s in seen if r == "a"] == list(range(1, 21))
    assert [s for r, s in seen if r == "b"] == list(range(1, 21))


async def test_event_published_before_a_crash_is_not_published_again(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    await append(db, "a", "one")
    watcher = Watcher(bus)
    async with running(Relay(db, bus, "test").run(), watcher.run()):
        stream = watcher.follow(subjects=SUBJECTS, cursor="", snapshot=nothing)
        await take(stream, 2)
    async with db.transaction() as conn:  # as if the relay had died before it noted the publish
        await conn.execute("update outbox set publish_time = null")
    await append(db, "a", "two")
    async with running(Relay(db, bus, "test").run()):
        async with asyncio.timeout(10):
            while (await bus.last_seq("detflow.v1.version.a.>")) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert (await bus.js.stream_info(EVENTS_STREAM)).state.messages == 2


async def test_relay_that_takes_over_again_publishes_only_what_is_missing(
    make_database: MakeDatabase, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_database("version")
    published: list[str] = []
    publish = bus.publish_durable

    async def counted(subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        await publish(subject, payload, headers)
        published.append(headers[Header.SEQ])

    monkeypatch.setattr(bus, "publish_durable", counted)
    watcher = Watcher(bus)
    first, second = Relay(db, bus, "test"), Relay(db, bus, "test")
    async with running(watcher.run()):
        stream = watcher.follow(subjects=SUBJECTS, cursor="", snapshot=nothing)
        await take(stream, 1)
        for relay in (first, second):
            async with running(relay.run()):
                await append(db, "a", "one")
                await take(stream, 1)
        async with db.transaction() as conn:  # as if the second had died before it noted that
            await conn.execute("update outbox set publish_time = null where seq = 2")
        async with running(first.run()):
            await append(db, "a", "three")
            await take(stream, 1)
    assert published == ["1", "2", "3"]


async def test_wiped_stream_is_filled_again_from_the_outbox(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    seen: list[str] = []
    twice = asyncio.Event()

    async def handle(conn: Connection, event: Delivered[events_pb2.Event]) -> None:
        seen.append(event.message.version.display_name)
        if "two" in seen:
            twice.set()

    await append(db, "a", "one")
    async with running(Relay(db, bus, "test").run()):
        async with asyncio.timeout(10):
            while (await bus.last_seq("detflow.v1.version.a.>")) < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    await bus.js.delete_stream(EVENTS_STREAM)
    await bus._on_reconnect()
    await append(db, "a", "two")
    async with running(Relay(db, bus, "test").run(), consumer(bus, db, handle).run()):
        async with asyncio.timeout(10):
            await twice.wait()
    assert seen == ["one", "two"]


async def test_early_event_waits_and_poison_goes_to_the_dead_letter_stream(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    applied: list[str] = []
    done = asyncio.Event()

    async def handle(conn: Connection, event: Delivered[events_pb2.Event]) -> None:
        name = event.message.version.display_name
        if name == "poison":
            raise ValueError("cannot be applied")
        if name == "early" and "base" not in applied:
            raise TooEarly
        applied.append(name)
        if len(applied) == 2:
            done.set()

    for resource, name in (("a", "poison"), ("b", "early"), ("c", "base")):
        await append(db, resource, name)
    dead = await bus.js.subscribe("detflow.dead.test")
    async with running(Relay(db, bus, "test").run(), consumer(bus, db, handle).run()):
        async with asyncio.timeout(30):
            await done.wait()
            letter = await dead.next_msg(timeout=25)
    assert applied == ["base", "early"]
    assert events_pb2.Event.FromString(letter.data).version.display_name == "poison"


async def test_watch_gives_snapshot_changes_and_the_exact_suffix_after_a_cursor(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    watcher = Watcher(bus)
    async with running(Relay(db, bus, "test").run(), watcher.run()):
        await append(db, "a", "in the snapshot")

        async def snapshot() -> Snapshot[str]:
            return Snapshot("now", {"version.a": 1})

        stream = watcher.follow(subjects=SUBJECTS, cursor="", snapshot=snapshot)
        (first,) = await take(stream, 1)
        for n in range(5):
            await append(db, "a", str(n))
        changes = await take(stream, 5)
        assert isinstance(first, Snapshot)
        assert first.value == "now"
        assert names(changes) == ["0", "1", "2", "3", "4"]
        for k, change in enumerate(changes[:-1]):
            again = watcher.follow(subjects=SUBJECTS, cursor=change.cursor, snapshot=nothing)
            assert names(await take(again, 4 - k)) == [str(n) for n in range(k + 1, 5)]
        resumed = watcher.follow(subjects=SUBJECTS, cursor=changes[-1].cursor, snapshot=nothing)
        await append(db, "a", "live")
        assert names(await take(resumed, 1)) == ["live"]


async def test_snapshot_taken_before_its_event_is_published_is_resumed_without_repetition(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    watcher = Watcher(bus)

    async def snapshot() -> Snapshot[str]:
        async with db.transaction(isolation="repeatable_read") as conn:
            return Snapshot("now", await outbox.last_seqs(conn, ["version.a"]))

    async with running(Relay(db, bus, "test").run(), watcher.run()):
        for n in range(20):
            await append(db, "a", f"known {n}")  # the relay has had no time yet
            stream = watcher.follow(subjects=SUBJECTS, cursor="", snapshot=snapshot)
            (first,) = await take(stream, 1)
            await stream.aclose()
            await append(db, "a", f"new {n}")
            resumed = watcher.follow(subjects=SUBJECTS, cursor=first.cursor, snapshot=snapshot)
            assert names(await take(resumed, 1)) == [f"new {n}"]
            await resumed.aclose()


async def test_watch_conflates_gauges_and_beats_when_idle(bus: Bus) -> None:
    watcher = Watcher(bus)
    async with running(watcher.run()):
        stream = watcher.follow(
            subjects=SUBJECTS,
            cursor="",
            snapshot=nothing,
            progress_subject="detflow.progress.version.a",
            heartbeat_seconds=0.3,
        )
        await take(stream, 1)
        for n in range(100):
            await bus.publish("detflow.progress.version.a", str(n).encode())
        gauges: list[bytes] = []
        async with asyncio.timeout(10):
            async for item in stream:
                if isinstance(item, Gauge):
                    gauges.append(item.payload)
                if isinstance(item, Beat):
                    break
    assert gauges[-1] == b"99"
    assert len(gauges) < 10


async def test_cursor_that_is_tampered_or_too_old_is_refused(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    watcher = Watcher(bus)
    async with running(Relay(db, bus, "test").run(), watcher.run()):
        stream = watcher.follow(subjects=SUBJECTS, cursor="", snapshot=nothing)
        await append(db, "a", "one")
        item = (await take(stream, 2))[-1]
        for n in range(3):
            await append(db, "a", str(n))
        await take(stream, 3)
        with pytest.raises(InvalidArgument, match="cursor"):
            await take(watcher.follow(subjects=SUBJECTS, cursor="zzz", snapshot=nothing), 1)
        await bus.js.purge_stream(EVENTS_STREAM)
        with pytest.raises(OutOfRange) as caught:
            await take(watcher.follow(subjects=SUBJECTS, cursor=item.cursor, snapshot=nothing), 1)
        assert caught.value.reason == "CURSOR_EXPIRED"


async def test_slow_watcher_is_dropped_without_a_hole_before_the_end(
    make_database: MakeDatabase, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_database("version")
    monkeypatch.setattr(watch, "_MAX_PENDING", 3)
    watcher = Watcher(bus)
    async with running(Relay(db, bus, "test").run(), watcher.run()):
        slow = watcher.follow(subjects=SUBJECTS, cursor="", snapshot=nothing)
        quick = watcher.follow(subjects=SUBJECTS, cursor="", snapshot=nothing)
        await take(slow, 1)
        await take(quick, 1)
        for n in range(4):
            await append(db, "a", str(n))
            await take(quick, 1)
        received = await take(slow, 1)
        await append(db, "a", "4")  # there is room for it, but not for the one before
        await take(quick, 1)
        with pytest.raises(ResourceExhausted) as caught:
            while True:
                received += await take(slow, 1)
        assert caught.value.reason == "SLOW_WATCHER"
        assert names(received) == ["0", "1", "2"]
        cursor = received[-1].cursor
        again = watcher.follow(subjects=SUBJECTS, cursor=cursor, snapshot=nothing)
        assert names(await take(again, 2)) == ["3", "4"]
