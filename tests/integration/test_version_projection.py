"""The version projection against real Postgres and NATS: disorder, restarts, a wrong sender."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest

from detflow.errors import Aborted, AlreadyExists
from detflow.events import DEAD_STREAM, Bus, Header, subscribe_from
from detflow.names import new_id
from detflow.outbox import Relay
from detflow.postgres import Database
from detflow.v1 import common_pb2, events_pb2, preprocess_pb2, training_pb2, version_pb2
from detflow.watch import Change, Snapshot, Watcher
from services.version import domain, project_store, store
from services.version.consumer import projection
from services.version.service import announce
from tests.background import running

MakeDatabase = Callable[[str], Awaitable[Database]]
Published = tuple[str, int, events_pb2.Event, datetime]

START = datetime(2024, 5, 1, tzinfo=UTC)
RUNS = [
    ["QUEUED", "PROVISIONING", "QUEUED", "PROVISIONING", "RUNNING", "FAILED"],
    ["QUEUED", "STOPPED"],
    ["QUEUED", "PROVISIONING", "RUNNING", "EVALUATING", "SUCCEEDED"],
]


async def insert(db: Database, display_name: str = "") -> domain.Version:
    async with db.transaction() as conn:
        version = await store.insert_version(
            conn,
            version_id=new_id(),
            project_id="default",
            display_name=display_name or await project_store.take_display_name(conn, "default"),
            dataset="projects/default/datasets/d1",
            class_names=["circle"],
            recipe=b"",
            request_id=None,
            request_sha256=b"",
        )
        await announce(conn, version, "created")
    return version


def preprocessed(version: domain.Version, revision: int = 1) -> Published:
    return (
        f"detflow.v1.preprocessing.{version.id}.state_changed",
        revision,
        events_pb2.Event(
            preprocessing=preprocess_pb2.Preprocessing(
                version=version.name,
                revision=revision,
                state=preprocess_pb2.Preprocessing.SUCCEEDED,
                manifest=common_pb2.StoredObject(key="m", size_bytes=1, sha256="ab"),
                num_images=version_pb2.SplitCounts(train=7, val=2, test=1),
            )
        ),
        START,
    )


def trained(
    version: domain.Version, training_id: str, revision: int, state: str, minute: int
) -> Published:
    return (
        f"detflow.v1.training.{training_id}.state_changed",
        revision,
        events_pb2.Event(
            training=training_pb2.Training(
                name=f"{version.name}/trainings/{training_id}",
                revision=revision,
                state=training_pb2.Training.State.Value(state),
            )
        ),
        START + timedelta(minutes=minute),
    )


def history(version: domain.Version) -> list[Published]:
    """Preprocessing, and three trainings one after the other."""
    events = [preprocessed(version)]
    for number, run in enumerate(RUNS):
        for revision, state in enumerate(run, start=1):
            events.append(trained(version, f"{version.id}t{number}", revision, state, len(events)))
    return events


async def publish(bus: Bus, published: Published, copy: int = 0) -> None:
    subject, seq, event, time = published
    await bus.publish_durable(
        subject,
        event.SerializeToString(),
        {
            Header.EVENT_ID: f"{subject}/{seq}/{copy}",
            Header.SEQ: str(seq),
            "ce-time": time.isoformat(),
        },
    )


async def changes(watcher: Watcher) -> AsyncIterator[version_pb2.Version]:
    """Begins to watch all versions; what is iterated are their changes from now on."""

    async def nothing() -> Snapshot[None]:
        return Snapshot(None, {})

    items = watcher.follow(subjects=["detflow.v1.version.>"], cursor="", snapshot=nothing)
    await anext(items)

    async def versions() -> AsyncIterator[version_pb2.Version]:
        async for item in items:
            if isinstance(item, Change):
                yield item.event.version

    return versions()


async def test_disorder_copies_and_restarts_of_the_consumer_end_in_the_same_state(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    watcher = Watcher(bus)
    chance = random.Random(7)
    async with asyncio.timeout(60), running(Relay(db, bus, "test").run(), watcher.run()):
        stream = await changes(watcher)
        versions = [await insert(db) for _ in range(4)]
        deliveries = [(event, copy) for v in versions for event in history(v) for copy in (0, 1)]
        chance.shuffle(deliveries)
        for event, copy in deliveries:
            await publish(bus, event, copy)

        seen: dict[str, list[version_pb2.Version]] = {v.name: [] for v in versions}
        for _ in versions:
            created = await anext(stream)
            seen[created.name].append(created)

        def done() -> bool:
            return all(s[-1].state == version_pb2.Version.COMPLETED for s in seen.values())

        while not done():
            async with running(projection(bus, db).run()):
                for _ in range(15):  # then the consumer is cut off, wherever it stands
                    changed = await anext(stream)
                    seen[changed.name].append(changed)
                    if done():
                        break

    for version in versions:
        observed = seen[version.name]
        assert [v.revision for v in observed] == list(range(1, len(observed) + 1))
        states = [domain.State(version_pb2.Version.State.Name(v.state)) for v in observed]
        for before, after in itertools.pairwise(states):
            assert after in domain.GRAPH[before]
        assert observed[-1].training == f"{version.name}/trainings/{version.id}t2"


async def test_step_outside_the_graph_goes_to_the_dead_letters_and_others_flow(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    watcher = Watcher(bus)
    async with running(Relay(db, bus, "test").run(), watcher.run(), projection(bus, db).run()):
        broken, fine = await insert(db), await insert(db)
        await publish(bus, preprocessed(broken))
        await publish(bus, trained(broken, "dbad", 1, "QUEUED", 1))
        await publish(bus, trained(broken, "dbad", 2, "SUCCEEDED", 2))
        subjects = ["detflow.dead.version-projection"]
        async with asyncio.timeout(30), subscribe_from(bus, DEAD_STREAM, subjects, 1) as dead:
            (message,) = await dead.fetch(1, timeout=25)
        assert (message.headers or {})["detflow-error"] == "IllegalTransition"
        stream = await changes(watcher)
        await publish(bus, preprocessed(fine))
        async with asyncio.timeout(30):
            ready = await anext(stream)
        assert (ready.name, ready.state) == (fine.name, version_pb2.Version.READY)
        async with db.connection() as conn:
            stuck = await store.get_version(conn, "default", broken.id)
        assert stuck.state is domain.State.QUEUED


async def test_later_events_flow_past_those_that_nobody_can_read(
    make_database: MakeDatabase, bus: Bus
) -> None:
    db = await make_database("version")
    watcher = Watcher(bus)
    lost = {2, 5, 7}  # the first training's PROVISIONING, its second one, the second's QUEUED
    async with running(Relay(db, bus, "test").run(), watcher.run(), projection(bus, db).run()):
        version = await insert(db)
        stream = await changes(watcher)
        for number, (subject, seq, event, time) in enumerate(history(version)):
            headers = {Header.EVENT_ID: f"{subject}/{seq}", "ce-time": time.isoformat()}
            content = b"\xff" if number in lost else event.SerializeToString()
            await bus.publish_durable(subject, content, headers)
        states = [version.state]
        async with asyncio.timeout(40):
            async for changed in stream:
                if changed.state != version_pb2.Version.PREPROCESSING:
                    states.append(domain.State(version_pb2.Version.State.Name(changed.state)))
                if changed.state == version_pb2.Version.COMPLETED:
                    break
    assert all(after in domain.GRAPH[before] for before, after in itertools.pairwise(states))
    assert changed.training == f"{version.name}/trainings/{version.id}t2"


async def test_update_of_a_version_that_changed_meanwhile_is_aborted(
    make_database: MakeDatabase,
) -> None:
    db = await make_database("version")
    version = await insert(db)
    async with db.transaction() as conn:
        await store.update_version(conn, version, display_name="new", labels={})
    with pytest.raises(Aborted):
        async with db.transaction() as conn:
            await store.update_deleted(conn, version, deleted=True)


async def test_database_alone_keeps_names_unique_and_ready_versions_complete(
    make_database: MakeDatabase,
) -> None:
    db = await make_database("version")
    version = await insert(db, "한글")
    with pytest.raises(AlreadyExists):
        await insert(db, "한글")
    with pytest.raises(Exception, match="version_has_its_bundle"):
        async with db.transaction() as conn:
            await conn.execute("update version set state = 'READY' where id = $1", version.id)
