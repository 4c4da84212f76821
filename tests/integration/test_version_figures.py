"""Figures and the trash of versions on real Postgres: disorder, copies, races."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest

from detflow import events
from detflow.errors import NotFound
from detflow.events import Delivered
from detflow.names import new_id
from detflow.postgres import Database
from detflow.v1 import (
    common_pb2,
    events_pb2,
    metrics_pb2,
    preprocess_pb2,
    training_pb2,
    version_pb2,
)
from services.version import domain, project_store, store
from services.version.consumer import project
from services.version.purge import Purger

MakeDatabase = Callable[[str], Awaitable[Database]]
Event = events_pb2.Event


async def insert(db: Database) -> domain.Version:
    async with db.transaction() as conn:
        return await store.insert_version(
            conn,
            version_id=new_id(),
            project_id="default",
            display_name=await project_store.take_display_name(conn, "default"),
            dataset="projects/default/datasets/d1",
            class_names=["circle"],
            recipe=b"",
            request_id=None,
            request_sha256=b"",
        )


def preprocessed(version: domain.Version) -> Event:
    return Event(
        preprocessing=preprocess_pb2.Preprocessing(
            version=version.name,
            revision=1,
            state=preprocess_pb2.Preprocessing.SUCCEEDED,
            manifest=common_pb2.StoredObject(key="m", size_bytes=1, sha256="ab"),
            num_images=version_pb2.SplitCounts(train=7, val=2, test=1),
        )
    )


def trained(version: domain.Version, number: int, revision: int, state: str, attempt: int) -> Event:
    return Event(
        training=training_pb2.Training(
            name=f"{version.name}/trainings/{version.id}t{number}",
            revision=revision,
            state=training_pb2.Training.State.Value(state),
            attempt=attempt,
        )
    )


def measured(
    version: domain.Version,
    number: int,
    attempt: int,
    split: str,
    map50: float,
    failed: bool = False,
) -> Event:
    states = metrics_pb2.Evaluation
    return Event(
        evaluation=states(
            name=f"{version.name}/trainings/{version.id}t{number}/evaluations/{split}",
            state=states.FAILED if failed else states.SUCCEEDED,
            split=common_pb2.SPLIT_TEST if split == "test" else common_pb2.SPLIT_VAL,
            attempt=attempt,
            coco=metrics_pb2.CocoSummary(map50=map50, map50_95=map50 / 2),
            best_f1=metrics_pb2.OperatingPoint(precision=0.9, recall=0.8),
        )
    )


def history(version: domain.Version) -> list[Event]:
    """A training that fails after it was measured, and one that succeeds in its second attempt."""
    first = ["QUEUED", "PROVISIONING", "RUNNING", "EVALUATING", "FAILED"]
    runs = [(0, first, 1), (1, [*first[:-1], *first[:-1], "SUCCEEDED"], 2)]
    found = [preprocessed(version)]
    for number, states, last_attempt in runs:
        for revision, state in enumerate(states, start=1):
            attempt = last_attempt if revision > 4 else 1
            found.append(trained(version, number, revision, state, attempt))
    return [
        *found,
        measured(version, 0, 1, "test", 0.11),
        measured(version, 1, 1, "test", 0.22),
        measured(version, 1, 2, "val", 0.33),
        measured(version, 1, 2, "test", 0.44),
        measured(version, 1, 1, "test", 0.55, failed=True),
        measured(version, 1, 3, "val", -1.0),
    ]


def time_of(event: Event) -> datetime:
    """Gives the runs of a version's trainings an order."""
    number = int(event.training.name[-1]) if event.HasField("training") else 0
    return datetime(2024, 5, 1, tzinfo=UTC) + timedelta(hours=number)


async def deliver(db: Database, event: Event) -> bool:
    """Hands an event to the projection; False if it has to come again later."""
    delivered = Delivered(
        event_id=new_id(),
        subject="",
        kind="",
        resource_id="",
        what="",
        name="",
        seq=1,
        stream_seq=1,
        message=event,
        carrier={"ce-time": time_of(event).isoformat()},
    )
    try:
        async with db.transaction() as conn:
            await project(conn, delivered)
    except events.TooEarly:
        return False
    return True


async def test_figures_are_the_same_whatever_the_order_and_number_of_events(
    make_database: MakeDatabase,
) -> None:
    db = await make_database("version")
    chance = random.Random(3)
    for number in range(4):
        version = await insert(db)
        waiting = history(version) * 2
        chance.shuffle(waiting)
        seen: list[domain.Metrics | None] = []
        while waiting:
            if number % 2:  # all that is measured comes late
                waiting.sort(key=lambda event: event.HasField("evaluation"))
            event = waiting.pop(0)
            if not await deliver(db, event):
                waiting.insert(chance.randrange(len(waiting) + 1), event)
            async with db.connection() as conn:
                version = await store.get_version(conn, "default", version.id)
            if version.metrics not in seen:
                seen.append(version.metrics)
        assert version.state is domain.State.COMPLETED
        assert seen == [
            None,
            domain.Metrics(
                training_id=f"{version.id}t1", map50=0.44, map50_95=0.22, precision=0.9, recall=0.8
            ),
        ]
        async with db.connection() as conn:
            revisions = await conn.fetch(
                "select seq from outbox where resource = $1 order by seq", f"version.{version.id}"
            )
        assert version.revision == 1 + len(revisions)  # each change was announced, and none twice


async def test_of_many_purgers_one_removes_each_expired_version_and_says_so(
    make_database: MakeDatabase,
) -> None:
    db = await make_database("version")
    expired, live, young, kept = [[await insert(db) for _ in range(n)] for n in (6, 1, 1, 1)]
    async with db.transaction() as conn:
        for version in (*expired, *live):
            await store.update_deleted(conn, version, deleted=True, trash_time=timedelta(0))
        await store.update_deleted(conn, young[0], deleted=True, trash_time=timedelta(hours=1))
        # What is done in PREPROCESSING, or by a training, ends first.
        ids = [version.id for version in expired]
        await conn.execute("update version set state = 'FAILED' where id = any($1)", ids)
    purgers = [Purger(db) for _ in range(4)]

    async def purge(purger: Purger) -> int:
        num_purged = 0
        while await purger.step():
            num_purged += 1
        return num_purged

    # A purger that finds the others at work may look away; the last look finds what is left.
    counts = [*await asyncio.gather(*map(purge, purgers)), await purge(purgers[0])]
    assert sum(counts) == len(expired)
    async with db.connection() as conn:
        rows = await conn.fetch("select payload from outbox where subject like '%.purged'")
        names = sorted(Event.FromString(row["payload"]).version.name for row in rows)
        assert names == sorted(version.name for version in expired)
        for version in expired:
            with pytest.raises(NotFound):
                await store.get_version(conn, "default", version.id)
        left = await store.list_versions(conn, "default", show_deleted=True)
    assert {version.id for version in left} == {v[0].id for v in (live, young, kept)}
