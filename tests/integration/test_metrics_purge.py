"""What is kept of trainings whose version was purged: nothing, whenever it is heard of."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from detflow.events import Delivered
from detflow.names import new_id
from detflow.postgres import Database
from detflow.tasks import Bell
from detflow.v1 import events_pb2, training_pb2
from services.metrics import store
from services.metrics.consumer import TrainingEvents

MakeDatabase = Callable[[str], Awaitable[Database]]


@pytest.fixture
async def db(make_database: MakeDatabase) -> Database:
    return await make_database("metrics")


def delivered(name: str, what: str, event: events_pb2.Event) -> Delivered[events_pb2.Event]:
    return Delivered(
        event_id=new_id(),
        subject="",
        kind=name.split("/")[-2].removesuffix("s"),
        resource_id=name.rsplit("/", 1)[1],
        what=what,
        name=name,
        seq=1,
        stream_seq=1,
        message=event,
        carrier={},
    )


def purged(version: str) -> Delivered[events_pb2.Event]:
    return delivered(f"projects/p/versions/{version}", "purged", events_pb2.Event())


def history(version: str) -> list[Delivered[events_pb2.Event]]:
    """A training that reports states, steps, an epoch and predictions."""
    name = f"projects/p/versions/{version}/trainings/{version}t"
    states = training_pb2.Training
    epoch = training_pb2.EpochMetrics(attempt=1, epoch=1, values={"lr": 0.5})
    steps = training_pb2.StepMetrics(
        attempt=1,
        epoch=1,
        first_step=1,
        num_steps=2,
        columns=[training_pb2.StepMetrics.Column(name="lr", values=[0.5, 0.25])],
    )
    return [
        delivered(
            name,
            "state_changed",
            events_pb2.Event(training=states(revision=1, state=states.RUNNING, attempt=1)),
        ),
        delivered(name, "steps_completed", events_pb2.Event(steps=steps)),
        delivered(name, "epoch_completed", events_pb2.Event(epoch=epoch)),
        delivered(
            name,
            "predictions_written",
            events_pb2.Event(predictions=training_pb2.Predictions(attempt=1)),
        ),
    ]


async def handle(db: Database, event: Delivered[events_pb2.Event]) -> None:
    async with db.transaction() as conn:
        await TrainingEvents(Bell(), Bell()).handle(conn, event)


async def count(db: Database) -> dict[str, int]:
    async with db.connection() as conn:
        return {
            table: await conn.fetchval(f"select count(*) from {table}")
            for table in ("training", "epoch_row", "step_block", "series_names", "evaluation_job")
        }


async def test_nothing_of_a_purged_version_stays_in_whatever_order_it_is_heard_of(
    db: Database,
) -> None:
    chance = random.Random(1)
    for event in history("kept"):
        await handle(db, event)
    before = await count(db)
    assert before["epoch_row"] == before["step_block"] == 1 and before["evaluation_job"] == 2
    for number in range(8):
        events = [*history(f"v{number}"), purged(f"v{number}")] * 2
        chance.shuffle(events)
        for event in events:
            await handle(db, event)
        assert await count(db) == before


async def test_event_that_races_a_purge_leaves_nothing(db: Database) -> None:
    for number in range(15):
        version = f"v{number}"
        await asyncio.gather(
            *(handle(db, event) for event in history(version)), handle(db, purged(version))
        )
        assert not any((await count(db)).values())
    async with db.connection() as conn:
        assert await store.is_purged(conn, "v0")
