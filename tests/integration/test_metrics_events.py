"""Events to points and evaluations on real Postgres and NATS, with kills and disorder."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from detflow import names
from detflow.consumer import Consumer
from detflow.errors import from_status
from detflow.events import EVENTS_STREAM, Bus, Delivered
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.tasks import Bell, wait
from detflow.v1 import events_pb2, training_pb2
from detflow.v1.common_pb2 import Failure
from services.metrics import series_store
from services.metrics import store as tables
from services.metrics.consumer import CONSUMER, SUBJECTS, TrainingEvents
from services.metrics.domain import Evaluation
from services.metrics.evaluator import MAX_TRIES, Evaluator
from services.metrics.series import epoch_series
from services.metrics.series_reader import read_epoch_series, read_step_series
from tests.metrics_fakes import FakeTraining, Row, ground_truth, parquet, put_bundle

MakeDatabase = Callable[[str], Awaitable[Database]]
TRUTH = ground_truth(1, 1, [(1, 0, [0, 0, 40, 40], 0)])
ROWS: list[Row] = [(1, 0, 0.75, 0, 0, 40, 40)]


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
        while pending := [task for task in tasks if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=1)


def delivered(training_id: str, seq: int, event: events_pb2.Event) -> Delivered[events_pb2.Event]:
    return Delivered(
        event_id=f"{training_id}/{seq}",
        subject="",
        kind="training",
        resource_id=training_id,
        what="",
        name=f"projects/p/versions/v/trainings/{training_id}",
        seq=seq,
        stream_seq=seq,
        message=event,
        carrier={},
    )


@pytest.fixture
async def db(make_database: MakeDatabase) -> Database:
    return await make_database("metrics")


# Attempts as (first epoch, number of epochs); each goes on from an epoch that is there.
histories = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=4)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(history=histories, data=st.data())
async def test_points_depend_on_what_came_and_not_on_the_order(
    db: Database,
    history: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    expected: dict[int, float] = {}
    events: list[events_pb2.Event] = []
    for number, (back, num_epochs) in enumerate(history, start=1):
        first = max(1, max(expected, default=0) + 1 - back)
        expected = {epoch: value for epoch, value in expected.items() if epoch < first}
        for epoch in range(first, first + num_epochs):
            expected[epoch] = number * 100.0 + epoch
            metrics = training_pb2.EpochMetrics(
                attempt=number, epoch=epoch, values={"lr": expected[epoch]}
            )
            events.append(events_pb2.Event(epoch=metrics))
    training_id = names.new_id()
    numbered = [delivered(training_id, n, event) for n, event in enumerate(events, start=1)]
    again = data.draw(st.lists(st.sampled_from(numbered), max_size=6))
    order = data.draw(st.permutations([*numbered, *again]))
    handler = TrainingEvents(Bell(), Bell())
    async with db.transaction() as conn:
        for event in order:
            await handler.handle(conn, event)
        rows = await series_store.list_epochs(conn, training_id)
        training = await tables.get_training(conn, training_id)
    found = {
        one.name: dict(zip(one.epochs_N, one.values_N, strict=True)) for one in epoch_series(rows)
    }
    assert found == {"lr": expected}
    assert training is not None
    assert training.attempt == len(history)
    assert (training.applied.seq, training.applied.ahead) == (len(events), ())


@dataclass
class StepHistory:
    """A training of 4 steps an epoch as its attempts tell of it, and what of it is to be seen.

    Places are counted in steps from the begin of the training.
    """

    events: list[events_pb2.Event] = field(default_factory=list)
    steps: dict[int, float] = field(default_factory=dict)
    epochs: dict[int, float] = field(default_factory=dict)
    num_attempts: int = 0

    def attempt(self, back: int, lengths: list[int], measures_again: bool) -> None:
        """Has an attempt go on before the last steps and tell blocks of these lengths at most.

        Args:
            back: How many steps were lost.
            lengths: Steps of each block, unless its epoch ends before.
            measures_again: Where it goes on between epochs, it measures the one before once more.
        """
        self.num_attempts += 1
        first = max(0, max(self.steps, default=-1) + 1 - back)
        measures_again = measures_again and first > 0 and first % 4 == 0
        if lengths or measures_again:
            self.steps = {place: value for place, value in self.steps.items() if place < first}
        if measures_again:
            self._tell_epoch(first // 4, is_first=True)
        is_first = not measures_again
        place = first
        for length in lengths:
            length = min(length, 4 - place % 4)
            self._tell_steps(place, length)
            place += length
            if place % 4 == 0:
                self._tell_epoch(place // 4, is_first=is_first)
                is_first = False

    def _tell_steps(self, place: int, length: int) -> None:
        values = [1000.0 * self.num_attempts + number for number in range(place, place + length)]
        self.steps |= dict(zip(range(place, place + length), values, strict=True))
        block = training_pb2.StepMetrics(
            attempt=self.num_attempts,
            epoch=place // 4 + 1,
            first_step=place % 4 + 1,
            num_steps=4,
            columns=[
                training_pb2.StepMetrics.Column(name="zero", values=[0.0] * length),
                training_pb2.StepMetrics.Column(name="lr", values=values),
            ],
        )
        self.events.append(events_pb2.Event(steps=block))

    def _tell_epoch(self, epoch: int, *, is_first: bool) -> None:
        if is_first:
            self.epochs = {one: value for one, value in self.epochs.items() if one < epoch}
        self.epochs[epoch] = 1000.0 * self.num_attempts
        metrics = training_pb2.EpochMetrics(
            attempt=self.num_attempts, epoch=epoch, values={"lr": self.epochs[epoch]}
        )
        self.events.append(events_pb2.Event(epoch=metrics))


block_lengths = st.lists(st.integers(1, 4), max_size=6)
step_attempts = st.tuples(st.integers(0, 9), st.just([]) | block_lengths, st.booleans())


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(history=st.lists(step_attempts, min_size=1, max_size=4), data=st.data())
async def test_steps_depend_on_what_came_and_not_on_the_order(
    db: Database, history: list[tuple[int, list[int], bool]], data: st.DataObject
) -> None:
    told = StepHistory()
    for back, lengths, measures_again in history:
        told.attempt(back, lengths, measures_again)
    assume(told.events)
    training_id = names.new_id()
    numbered = [delivered(training_id, n, event) for n, event in enumerate(told.events, start=1)]
    again = data.draw(st.lists(st.sampled_from(numbered), max_size=6))
    order = data.draw(st.permutations([*numbered, *again]))
    handler = TrainingEvents(Bell(), Bell())
    async with db.transaction() as conn:
        for event in order:
            await handler.handle(conn, event)
        training = await tables.get_training(conn, training_id)
        assert training is not None
        by_epoch = await read_epoch_series(conn, training)
        by_step = {s.name: s for s in await read_step_series(conn, training, max_points=1000)}
    epochs = {s.name: dict(zip(s.epochs_N, s.values_N, strict=True)) for s in by_epoch}
    assert epochs == ({"lr": told.epochs} if told.epochs else {})
    if not told.steps:
        assert not by_step
        return
    found = by_step["lr"]
    assert (found.positions_N * 4 - 1).tolist() == list(range(len(told.steps)))
    assert found.values_N.tolist() == [told.steps[place] for place in sorted(told.steps)]
    assert by_step["zero"].values_N.tolist() == [0.0] * len(told.steps)


async def evaluations(db: Database, training_id: str) -> list[Evaluation]:
    async with db.connection() as conn:
        training = await tables.get_training(conn, training_id)
        return await tables.list_evaluations(conn, training) if training else []


async def until_evaluated(bus: Bus, training: FakeTraining, count: int = 2) -> None:
    """Waits until the stream holds `count` evaluations of a training."""
    subscription = await bus.js.subscribe(
        f"detflow.v1.evaluation.{training.id}.completed", stream=EVENTS_STREAM
    )
    async with asyncio.timeout(40):
        for _ in range(count):
            await subscription.next_msg(timeout=40)
    await subscription.unsubscribe()


async def num_published(bus: Bus, subject: str) -> int:
    info = await bus.js.stream_info(EVENTS_STREAM, subjects_filter=subject)
    return sum((info.state.subjects or {}).values())


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


@pytest.mark.parametrize("seed", range(2))
async def test_killed_service_takes_its_evaluations_up_again_and_publishes_each_once(
    make_database_url: Callable[[str], Awaitable[str]],
    bus: Bus,
    nats_url: str,
    store: ObjectStore,
    tmp_path: Path,
    seed: int,
) -> None:
    url = await make_database_url("metrics")
    environ = {
        "DETFLOW_DATABASE_URL": url,
        "DETFLOW_NATS_URL": nats_url,
        "DETFLOW_STORE_URL": store.url,
        "DETFLOW_DATA_DIR": str(tmp_path / "scratch"),
        "DETFLOW_LOG_LEVEL": "warning",
        "DETFLOW_ACCESS": "open",
    }
    manifest = put_bundle(store, {"val": TRUTH, "test": TRUTH})
    predictions = store.put("trainings/t/1/predictions.parquet", parquet(ROWS))
    training = FakeTraining(bus, names.new_id())
    db = await Database.connect(url, schema="metrics")
    try:
        async with service_process(environ) as process:
            await training.run()
            await training.epoch(1, lr=0.5)
            await training.predictions(manifest, predictions, predictions)
            async with asyncio.timeout(30):
                if seed == 0:  # while it measures the first split
                    await until_row(db, "select from evaluation_job where lease <> ''")
                else:  # between the first split and the second
                    await until_row(db, "select from evaluation")
            process.send_signal(signal.SIGKILL)
            await process.wait()
        async with service_process(environ):
            await until_evaluated(bus, training)
        found = await evaluations(db, training.id)
        assert [(e.split, e.failure) for e in found] == [("val", None), ("test", None)]
        async with db.connection() as conn:
            assert not await conn.fetchval("select count(*) from evaluation_job")
            points = await series_store.list_epochs(conn, training.id)
            published = await conn.fetchval(
                "select count(*) from outbox where resource = $1", f"evaluation.{training.id}"
            )
        assert [(point.epoch, point.values) for point in points] == [(1, [0.5])]
        assert published == 2
        assert await num_published(bus, f"detflow.v1.evaluation.{training.id}.>") == 2
    finally:
        await db.close()


async def until_row(db: Database, query: str) -> None:
    """Waits until a query has a row."""
    while True:
        async with db.connection() as conn:
            if await conn.fetchrow(query) is not None:
                return
        await asyncio.sleep(0)


async def queue_job(db: Database, training_id: str, store: ObjectStore, num_tries: int) -> None:
    """Queues the validation predictions of a training as if tried before."""
    predictions = training_pb2.Predictions(
        attempt=1,
        manifest=put_bundle(store, {"val": TRUTH, "test": TRUTH}),
        val=store.put("predictions.parquet", parquet(ROWS)),
    )
    handler = TrainingEvents(Bell(), Bell())
    async with db.transaction() as conn:
        event = events_pb2.Event(predictions=predictions)
        await handler.handle(conn, delivered(training_id, 1, event))
        await conn.execute("delete from evaluation_job where split = 'test'")
        await conn.execute("update evaluation_job set num_tries = $1", num_tries)


@pytest.mark.parametrize("num_tries", [MAX_TRIES - 1, MAX_TRIES])
async def test_predictions_that_kill_their_process_are_given_up(
    db: Database, store: ObjectStore, num_tries: int
) -> None:
    training_id = names.new_id()
    await queue_job(db, training_id, store, num_tries)
    # An address no store understands ends the child with a traceback.
    async with running(Evaluator(db, "nonsense://", Bell()).run()):
        async with asyncio.timeout(30):
            await until_row(db, "select from evaluation")
    (evaluation,) = await evaluations(db, training_id)
    assert evaluation.failure is not None
    error = from_status(Failure.FromString(evaluation.failure).status)
    assert error.reason == "EVALUATION_KEEPS_FAILING"


async def test_failed_try_is_put_off_and_keeps_the_job(db: Database, store: ObjectStore) -> None:
    training_id = names.new_id()
    await queue_job(db, training_id, store, 0)
    async with running(Evaluator(db, "nonsense://", Bell()).run()):
        async with asyncio.timeout(30):
            await until_row(db, "select from evaluation_job where num_tries = 2")
    # Stopped in the middle of the second try: the job is free at once.
    assert await evaluations(db, training_id) == []
    async with running(Evaluator(db, store.url, Bell()).run()):
        async with asyncio.timeout(30):
            await until_row(db, "select from evaluation")
    (evaluation,) = await evaluations(db, training_id)
    assert evaluation.measurement is not None
    assert evaluation.measurement.num_predictions == 1


async def test_training_put_to_rest_gives_up_what_waits_to_be_measured(
    db: Database, store: ObjectStore
) -> None:
    training_id = names.new_id()
    await queue_job(db, training_id, store, 0)
    stopped = training_pb2.Training(state=training_pb2.Training.STOPPED, revision=1, attempt=1)
    async with db.transaction() as conn:
        job = await tables.claim_job(conn, lease="x", lease_seconds=10)
        assert job is not None
        handler = TrainingEvents(Bell(), Bell())
        await handler.handle(conn, delivered(training_id, 2, events_pb2.Event(training=stopped)))
        assert not await tables.update_job_lease(conn, job, seconds=10)
        assert not await tables.delete_job(conn, job)


async def test_two_replicas_never_hold_one_job(db: Database, store: ObjectStore) -> None:
    training_id = names.new_id()
    await queue_job(db, training_id, store, 0)

    async def claim(lease: str) -> str | None:
        async with db.transaction() as conn:
            job = await tables.claim_job(conn, lease=lease, lease_seconds=60)
            return job.lease if job else None

    claimed = await asyncio.gather(*(claim(str(n)) for n in range(8)))
    assert len([lease for lease in claimed if lease is not None]) == 1


async def test_poison_event_is_put_aside_and_later_ones_flow(db: Database, bus: Bus) -> None:
    training = FakeTraining(bus, names.new_id())
    applied = Bell()
    consumer = Consumer(
        bus,
        db,
        name=CONSUMER,
        stream=EVENTS_STREAM,
        subjects=SUBJECTS,
        decode=events_pb2.Event.FromString,
        handle=TrainingEvents(applied, Bell()).handle,
    )
    poison = training_pb2.Training(revision=99)
    poison.state = 77  # type: ignore[assignment]  # of a later version of the contract
    async with running(consumer.run()):
        await training.run()
        await training.publish("state_changed", events_pb2.Event(training=poison))
        await training.epoch(1, lr=0.5)
        async with asyncio.timeout(30):
            while True:
                heard = applied.listen()
                async with db.connection() as conn:
                    if await series_store.list_epochs(conn, training.id):
                        break
                await wait(heard, 30)
        dead = await bus.js.subscribe(f"detflow.dead.{CONSUMER}", stream="DETFLOW_DEAD")
        await dead.next_msg(timeout=30)
    async with db.connection() as conn:
        found = await tables.get_training(conn, training.id)
    assert found is not None
    assert (found.applied.seq, found.applied.ahead) == (3, (5,))
