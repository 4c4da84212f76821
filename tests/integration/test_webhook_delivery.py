"""From an event to a request that is taken, on real Postgres, NATS and HTTP, with kills."""

import asyncio
import os
import random
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from detflow.consumer import Consumer
from detflow.errors import FailedPrecondition, failure
from detflow.events import EVENTS_STREAM, Bus, Delivered
from detflow.names import new_id
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.tasks import Bell, cancel_all
from detflow.v1 import events_pb2, training_pb2
from services.metrics import store as metrics_store
from services.metrics.webhooks import delivery_store, store
from services.metrics.webhooks.consumer import CONSUMER, SUBJECTS, WebhookEvents
from services.metrics.webhooks.deliverer import Deliverer
from services.metrics.webhooks.domain import Delivery, DeliveryState, EventType, Webhook
from services.metrics.webhooks.hosts import AllowedHosts
from services.metrics.webhooks.sender import Sender
from services.metrics.webhooks.signature import new_key, to_secret
from tests.metrics_fakes import FakeTraining
from tests.webhook_rig import receiving

MakeDatabase = Callable[[str], Awaitable[Database]]
State = training_pb2.Training
SOON = (0.01,) * 7


@pytest.fixture
async def db(make_database: MakeDatabase) -> Database:
    return await make_database("metrics")


async def create(
    db: Database,
    url: str,
    *events: EventType,
    project: str = "p",
    disabled: bool = False,
    key: bytes = b"k",
) -> Webhook:
    async with db.transaction() as conn:
        webhook = await store.insert_webhook(
            conn,
            webhook_id=new_id(),
            project_id=project,
            display_name="hook",
            url=url,
            event_types=events,
            disabled=disabled,
            request_id=None,
            request_sha256=b"",
            key=key,
        )
    assert webhook is not None
    return webhook


def ended(
    training_id: str = "t1",
    state: Any = State.SUCCEEDED,
    *,
    revision: int = 5,
    project: str = "p",
    version: str = "v1",
    time: datetime | None = None,
    **fields: Any,
) -> Delivered[events_pb2.Event]:
    """A change of state of a training, as its event is delivered."""
    name = f"projects/{project}/versions/{version}/trainings/{training_id}"
    training = State(name=name, state=state, revision=revision, attempt=1, **fields)
    return Delivered(
        event_id=new_id(),
        subject="",
        kind="training",
        resource_id=training_id,
        what="state_changed",
        name=name,
        seq=revision,
        stream_seq=1,
        message=events_pb2.Event(training=training),
        carrier={"ce-time": time.isoformat()} if time else {},
    )


async def handle(db: Database, *events: Delivered[events_pb2.Event]) -> None:
    for event in events:
        async with db.transaction() as conn:
            await WebhookEvents(Bell()).handle(conn, event)


async def sent_to(db: Database, webhook: Webhook) -> list[Delivery]:
    async with db.connection() as conn:
        return await delivery_store.list_deliveries(conn, webhook.id, before=None, limit=1000)


def deliverer(db: Database, due: Bell | None = None, **options: Any) -> Deliverer:
    sender = Sender(AllowedHosts.parse("loopback"), options.pop("seconds", 5.0))
    return Deliverer(db, sender, due or Bell(), **{"schedule": SOON} | options)


@asynccontextmanager
async def running(*works: Any) -> AsyncIterator[None]:
    """Runs background work; a failure of it fails the test."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        await cancel_all(tasks)


async def settled(db: Database, webhook: Webhook, count: int = 1) -> list[Delivery]:
    """Waits until no delivery of a webhook is pending."""
    async with asyncio.timeout(20):
        while True:
            found = await sent_to(db, webhook)
            if len(found) == count and all(d.state != DeliveryState.PENDING for d in found):
                return found


async def test_message_is_sent_again_until_it_is_taken(db: Database) -> None:
    key = new_key()
    async with receiving(500, 302, 200) as receiver:
        webhook = await create(db, receiver.url, key=key)
        error = failure(FailedPrecondition("the disk is full", reason="DISK_FULL"))
        time = datetime.now(UTC) + timedelta(seconds=1)
        await handle(db, ended(state=State.FAILED, model="yolov8n", failure=error, time=time))
        async with running(deliverer(db).run()):
            (delivery,) = await settled(db, webhook)
    first, *others = receiver.received
    assert len(others) == 2
    assert all(one.id == first.id and one.body == first.body for one in others)
    assert all(one.is_signed_by(to_secret(key)) for one in receiver.received)
    assert first.json == {
        "type": "training.failed",
        "timestamp": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": {
            "project": "projects/p",
            "version": "projects/p/versions/v1",
            "training": "projects/p/versions/v1/trainings/t1",
            "model": "yolov8n",
            "state": "FAILED",
            "failure": {"reason": "DISK_FULL", "message": "the disk is full"},
            "metrics": {},
        },
    }
    assert (delivery.id, delivery.state) == (first.id, DeliveryState.DELIVERED)
    assert (delivery.num_tries, delivery.http_status, delivery.error) == (3, 200, "")
    assert delivery.next_try_time is None and delivery.last_try_time is not None


async def test_message_nobody_takes_is_given_up_after_the_last_try(db: Database) -> None:
    async with receiving(500) as receiver:
        webhook = await create(db, receiver.url)
        await handle(db, ended())
        async with running(deliverer(db, schedule=(0.01, 0.01)).run()):
            (delivery,) = await settled(db, webhook)
        assert len(receiver.received) == 3
    assert (delivery.state, delivery.num_tries) == (DeliveryState.FAILED, 3)
    assert (delivery.http_status, delivery.error) == (500, "answered 500")


async def test_next_try_waits_for_its_time(db: Database) -> None:
    async with receiving(503) as receiver:
        webhook = await create(db, receiver.url)
        await handle(db, ended())
        async with running(deliverer(db, schedule=(600.0,)).run()):
            await receiver.next()
            async with asyncio.timeout(10):
                while not (await sent_to(db, webhook))[0].error:
                    pass
    (delivery,) = await sent_to(db, webhook)
    assert delivery.state == DeliveryState.PENDING and len(receiver.received) == 1
    assert delivery.next_try_time is not None and delivery.last_try_time is not None
    pause = (delivery.next_try_time - delivery.last_try_time).total_seconds()
    assert 600 <= pause <= 600 * 1.2 + 10


async def test_receiver_that_is_gone_disables_its_webhook(db: Database) -> None:
    due = Bell()
    async with receiving(410, 200) as receiver:
        webhook = await create(db, receiver.url)
        await handle(db, ended("t1"), ended("t2"))
        async with running(deliverer(db, due).run()):
            async with asyncio.timeout(10):
                while not (await get(db, webhook)).disabled:
                    pass
            # What waits is kept, what happens is not told, until somebody enables it.
            await handle(db, ended("t3"))
            disabled = await get(db, webhook)
            assert disabled.revision == 2
            states = [d.state for d in await sent_to(db, webhook)]
            assert states == [DeliveryState.PENDING, DeliveryState.FAILED]
            async with db.transaction() as conn:
                await conn.execute("update webhook set disabled = false")
            await due.ring()
            await settled(db, webhook, 2)
        assert len(receiver.received) == 2


async def get(db: Database, webhook: Webhook) -> Webhook:
    async with db.connection() as conn:
        return await store.get_webhook(conn, webhook.name)


async def test_only_who_wants_to_know_is_told(db: Database) -> None:
    told = await create(db, "http://x/")
    only_failures = await create(db, "http://x/", EventType.TRAINING_FAILED)
    others = [
        await create(db, "http://x/", project="q"),
        await create(db, "http://x/", disabled=True),
    ]
    before = datetime.now(UTC) - timedelta(hours=1)
    await handle(
        db,
        ended("t0", time=before),  # the first start reads what happened in a month
        *(
            ended(f"t{number}", state, revision=number)
            for number, (_, state) in enumerate(State.State.items(), 1)
            if state
        ),
    )
    kinds = [delivery.event_type for delivery in await sent_to(db, told)]
    assert sorted(kinds) == [
        EventType.TRAINING_COMPLETED,
        EventType.TRAINING_FAILED,
        EventType.TRAINING_STOPPED,
        EventType.TRAINING_STOPPED,
    ]
    (failed,) = await sent_to(db, only_failures)
    assert failed.event_type == EventType.TRAINING_FAILED
    assert failed.training == "projects/p/versions/v1/trainings/t7"
    assert [await sent_to(db, webhook) for webhook in others] == [[], []]


async def test_each_change_of_state_is_told_once_whatever_comes_twice_or_late(
    db: Database, bus: Bus
) -> None:
    webhook, due = await create(db, "http://x/"), Bell()
    training = FakeTraining(bus, new_id())
    consumer = Consumer(
        bus,
        db,
        name=CONSUMER,
        stream=EVENTS_STREAM,
        subjects=SUBJECTS,
        decode=events_pb2.Event.FromString,
        handle=WebhookEvents(due).handle,
    )
    events = {
        revision: events_pb2.Event(
            training=State(name=training.name, state=state, revision=revision, attempt=1)
        )
        for revision, state in enumerate(
            [State.QUEUED, State.PAUSED, State.QUEUED, State.FAILED, State.QUEUED, State.SUCCEEDED],
            1,
        )
    }
    order = [*events, *events, *events]
    random.Random(3).shuffle(order)
    for number, revision in enumerate(order):
        # Some come again as the same event, some as another one that says the same.
        event_id = f"{training.id}/{revision}/{number % 2}"
        await training.publish("state_changed", events[revision], seq=revision, event_id=event_id)
    last = FakeTraining(bus, new_id(), project="last")
    await last.state(State.FAILED)
    told_last = await create(db, "http://x/", project="last")
    async with running(consumer.run()):
        async with asyncio.timeout(20):
            while not await sent_to(db, told_last):
                pass
    kinds = [delivery.event_type for delivery in await sent_to(db, webhook)]
    assert sorted(kinds) == [1, 2, 3]


async def test_nothing_of_a_purged_version_stays_in_whatever_order_it_is_heard_of(
    db: Database,
) -> None:
    webhook = await create(db, "http://x/")
    await handle(db, ended("kept"))

    async def purge(version: str) -> None:
        async with db.transaction() as conn:
            await metrics_store.purge_version(conn, version)

    for number in range(10):
        version, training = f"w{number}", f"x{number}"
        told = handle(db, ended(training, version=version))
        if number < 2:
            for work in (told, purge(version)) if number else (purge(version), told):
                await work
        else:
            await asyncio.gather(told, purge(version))
    names = [delivery.training for delivery in await sent_to(db, webhook)]
    assert names == ["projects/p/versions/v1/trainings/kept"]


async def test_several_processes_send_each_message_once(db: Database) -> None:
    async with receiving(200) as receiver:
        webhooks = [await create(db, receiver.url) for _ in range(5)]
        await handle(db, *(ended(f"t{number}") for number in range(10)))
        async with running(*(deliverer(db).run() for _ in range(3))):
            for webhook in webhooks:
                await settled(db, webhook, 10)
    assert len(receiver.received) == len({one.id for one in receiver.received}) == 50


async def test_slow_receiver_delays_nobody_else(db: Database) -> None:
    answer = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        await answer.wait()
        return web.Response()

    async with receiving(slow) as stuck, receiving(200) as quick:
        waiting, served = await create(db, stuck.url), await create(db, quick.url)
        await handle(db, *(ended(f"t{number}") for number in range(30)))
        async with running(deliverer(db).run()):
            await settled(db, served, 30)
            assert len(stuck.received) == 1  # one at a time
            answer.set()
            await settled(db, waiting, 30)


async def test_delivery_under_way_is_given_back_when_the_process_is_told_to_stop(
    db: Database,
) -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with receiving(hang, 200) as receiver:
        webhook = await create(db, receiver.url)
        await handle(db, ended())
        async with running(deliverer(db).run()):
            first = await receiver.next()
        async with running(deliverer(db).run()):  # although the lease would last 30 seconds
            (delivery,) = await settled(db, webhook)
        assert (await receiver.next()).id == first.id
    assert delivery.num_tries == 2


async def test_late_answer_changes_nothing_once_another_process_has_sent(db: Database) -> None:
    answer = asyncio.Event()

    async def late(_: web.Request) -> web.StreamResponse:
        await answer.wait()
        return web.Response(status=500)

    async with receiving(late, 200) as receiver:
        webhook = await create(db, receiver.url)
        await handle(db, ended())
        slow = Bell()
        async with running(deliverer(db, slow, lease_seconds=0.0).run()):
            await receiver.next()
            async with running(deliverer(db).run()):
                await settled(db, webhook)
            finished = slow.listen()
            answer.set()
            async with asyncio.timeout(10):
                await finished.wait()
    (delivery,) = await sent_to(db, webhook)
    assert (delivery.state, delivery.http_status) == (DeliveryState.DELIVERED, 200)


async def test_deliveries_are_forgotten_after_thirty_days(db: Database) -> None:
    async with receiving(200) as receiver:
        webhook = await create(db, receiver.url)
        await handle(db, *(ended(f"t{number}") for number in range(3)))
        async with db.transaction() as conn:
            for training, days in (("t0", 29), ("t1", 31)):
                await conn.execute(
                    "update webhook_delivery set create_time = now() - make_interval(days => $2)"
                    " where training_id = $1",
                    training,
                    days,
                )
        async with running(deliverer(db).run()):
            found = await settled(db, webhook, 2)
    assert sorted(delivery.training[-2:] for delivery in found) == ["t0", "t2"]


@asynccontextmanager
async def service_process(environ: dict[str, str]) -> AsyncIterator[Process]:
    """The metrics service as a process; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.metrics", env=os.environ | environ
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_message_sent_by_a_killed_process_comes_again_with_the_same_id(
    make_database_url: Callable[[str], Awaitable[str]],
    bus: Bus,
    nats_url: str,
    store: ObjectStore,
    tmp_path: Path,
) -> None:
    url = await make_database_url("metrics")
    environ = {
        "DETFLOW_DATABASE_URL": url,
        "DETFLOW_NATS_URL": nats_url,
        "DETFLOW_STORE_URL": store.url,
        "DETFLOW_DATA_DIR": str(tmp_path / "scratch"),
        "DETFLOW_LOG_LEVEL": "warning",
        "DETFLOW_ACCESS": "open",
        "DETFLOW_WEBHOOK_HOSTS": "loopback",
    }
    process: Process | None = None

    async def taken_but_not_recorded(_: web.Request) -> web.StreamResponse:
        assert process is not None
        process.send_signal(signal.SIGKILL)
        return web.Response()

    db = await Database.connect(url, schema="metrics")
    try:
        async with receiving(taken_but_not_recorded, 200) as receiver:
            webhook = await create(db, receiver.url)
            training = FakeTraining(bus, new_id())
            async with service_process(environ) as process:
                await training.run()
                await training.state(State.FAILED)
                await process.wait()
            (delivery,) = await sent_to(db, webhook)
            assert (delivery.state, delivery.num_tries) == (DeliveryState.PENDING, 1)
            async with db.transaction() as conn:  # the lease of the dead is over
                await conn.execute("update webhook_delivery set next_try_time = now()")
            async with service_process(environ):
                await settled(db, webhook)
        first, second = receiver.received
        assert (first.id, first.body) == (second.id, second.body)
    finally:
        await db.close()
