"""Events that come twice, late and in any order end in the state that they end in when in order."""

import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

from detflow.consumer import Consumer, Handler
from detflow.events import Delivered, TooEarly
from detflow.names import new_id
from detflow.postgres import Database
from detflow.tasks import Bell
from detflow.v1 import events_pb2, training_pb2
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import (
    Checkpoint,
    EpochRecord,
    WorkerEvaluating,
    WorkerFinished,
    WorkerRecord,
    WorkerStarted,
)
from services.metrics import series_store
from services.metrics.consumer import TrainingEvents
from services.trainer import consumer, domain, ownership, store
from services.trainer.queue import Room
from services.version import domain as version_domain
from tests import trainer_players
from tests.trainer_players import MANIFEST
from tests.unit.test_version_domain import BUNDLE, NEW, Projection
from tests.unit.test_version_domain import training as version_event

M = TypeVar("M")
MakeDatabase = Callable[[str], Awaitable[Database]]
State = training_pb2.Training.State
ROOM = Room(devices=("cpu", "auto"), num_nodes=1, num_slots=1, num_free=1)
NUM_PURE = 10_000
NUM_IN_POSTGRES = int(os.environ.get("DETFLOW_CHAOS_HISTORIES", "60"))


def disorder(chance: random.Random, events: Sequence[M]) -> "deque[M]":
    """Shuffles events, some of which come twice or more often."""
    copies = chance.choices(events, k=chance.randint(0, len(events)))
    return deque(chance.sample([*events, *copies], len(events) + len(copies)))


def test_version_ends_in_the_same_state_whatever_the_order() -> None:
    chance = random.Random(1)
    for number in range(NUM_PURE):
        history = version_history(chance)
        truth = Projection(NEW)
        for event in history:
            truth.apply(event)
        waiting, num_postponed = disorder(chance, history), 0
        projection = Projection(NEW)
        while waiting:
            event = waiting.popleft()
            try:
                projection.apply(event)
                num_postponed = 0
            except version_domain.TooEarly:
                waiting.append(event)
                num_postponed += 1
                assert num_postponed <= len(waiting), (number, history)
        assert (projection.version, projection.followed) == (truth.version, truth.followed), number


def version_history(chance: random.Random) -> list[Any]:
    """Makes up what preprocess and trainer report of one version: trainings that crash and end."""
    P, T = version_domain.PreprocessingState, version_domain.TrainingState
    events: list[Any] = [
        version_domain.PreprocessingEvent(revision=1, state=P.PENDING),
        version_domain.PreprocessingEvent(revision=2, state=P.RUNNING),
        version_domain.PreprocessingEvent(revision=3, state=P.SUCCEEDED, bundle=BUNDLE),
    ]
    revisions: dict[str, int] = {}
    resumable: list[str] = []
    work = (T.QUEUED, T.PROVISIONING, T.RUNNING, T.EVALUATING)
    for _ in range(chance.randint(0, 4)):
        id_ = chance.choice([f"dt{len(revisions)}", *resumable])
        path = [work[: chance.randint(2, 4)] for _ in range(chance.randint(0, 2))]
        last = chance.randint(1, 4)
        end = chance.choice((T.FAILED, T.STOPPED, T.PAUSED, T.SUCCEEDED if last == 4 else T.FAILED))
        for state in [*(s for crashed in path for s in crashed), *work[:last], end]:
            revisions[id_] = revisions.get(id_, 0) + 1
            events.append(version_event(id_, revisions[id_], state, minute=len(events)))
        resumable = [other for other in resumable if other != id_]
        if end is T.SUCCEEDED:
            break
        if end is not T.STOPPED:
            resumable.append(id_)
    return events


async def deliver(
    db: Database, name: str, handle: Handler[M], events: "deque[Delivered[M]]"
) -> None:
    """Has a consumer apply events as JetStream delivers them: what is too early comes again."""
    made = Consumer(
        cast(Any, None),
        db,
        name=name,
        stream="",
        subjects=[],
        decode=cast(Any, None),
        handle=handle,
    )
    num_postponed = 0
    while events:
        event = events.popleft()
        try:
            await made._apply(event)
            num_postponed = 0
        except TooEarly:
            events.append(event)
            num_postponed += 1
            assert num_postponed <= len(events)


def event_of(subject: str, name: str, seq: int, message: M) -> Delivered[M]:
    """An event or a record as it is delivered."""
    _, _, kind, resource_id, what = [*subject.split("."), ""][:5]
    return Delivered(
        event_id=new_id(),
        subject=subject,
        kind=kind,
        resource_id=resource_id,
        what=what,
        name=name,
        seq=seq,
        stream_seq=seq,
        message=message,
        carrier={},
    )


async def test_metrics_are_the_same_whatever_the_order(make_database: MakeDatabase) -> None:
    db = await make_database("metrics")
    chance = random.Random(2)
    handle = TrainingEvents(Bell(), Bell()).handle
    for number in range(NUM_IN_POSTGRES):
        messages = metrics_history(chance)
        ended = []
        for is_shuffled in (False, True):
            id_ = new_id()
            name = f"projects/p/versions/v{number}/trainings/{id_}"
            subject = f"detflow.v1.training.{id_}.happened"
            events = [event_of(subject, name, seq, m) for seq, m in enumerate(messages, 1)]
            order = disorder(chance, events) if is_shuffled else deque(events)
            await deliver(db, "metrics-training", handle, order)
            ended.append(await metrics_state(db, id_))
        assert ended[0] == ended[1], (number, messages)


def metrics_history(chance: random.Random) -> list[events_pb2.Event]:
    """Makes up the events of a training whose attempts break off, the last of which may not."""
    messages: list[events_pb2.Event] = []
    revision = 0

    def told(state: "State.ValueType", attempt: int) -> None:
        nonlocal revision
        revision += 1
        training = training_pb2.Training(state=state, revision=revision, attempt=attempt)
        messages.append(events_pb2.Event(training=training))

    done, num_attempts = 0, chance.randint(1, 3)
    for attempt in range(1, num_attempts + 1):
        for state in (State.QUEUED, State.PROVISIONING, State.RUNNING):
            told(state, attempt)
        first = chance.randint(max(done - 1, 0), done) + 1  # the last epoch may be done again
        for epoch in range(first, first + chance.randint(0, 3)):
            column = training_pb2.StepMetrics.Column(name="lr", values=[attempt, epoch])
            steps = training_pb2.StepMetrics(
                attempt=attempt, epoch=epoch, first_step=1, num_steps=2, columns=[column]
            )
            values = {"lr": chance.random()}
            metrics = training_pb2.EpochMetrics(attempt=attempt, epoch=epoch, values=values)
            messages += [events_pb2.Event(steps=steps), events_pb2.Event(epoch=metrics)]
            done = epoch
    told(State.EVALUATING, num_attempts)
    stored = StoredObject(key="predictions", size_bytes=1, sha256="00" * 32)
    predictions = training_pb2.Predictions(
        attempt=num_attempts, manifest=MANIFEST, val=stored, test=stored
    )
    messages.append(events_pb2.Event(predictions=predictions))
    if chance.random() < 0.5:
        told(chance.choice((State.STOPPED, State.FAILED, State.PAUSED)), num_attempts)
    return messages


async def metrics_state(db: Database, id_: str) -> tuple[Any, ...]:
    """Returns all that metrics has of a training, without its id."""
    async with db.connection() as conn:
        row = await conn.fetchrow(
            "select state, revision, attempt, applied_seq, applied_ahead, message from training"
            " where id = $1",
            id_,
        )
        jobs = await conn.fetch(
            "select attempt, split from evaluation_job where training_id = $1 order by split", id_
        )
        epochs = await series_store.list_epochs(conn, id_)
        blocks = await conn.fetch(
            "select attempt, epoch, first_step, columns from step_block where training_id = $1"
            " order by attempt, epoch, first_step",
            id_,
        )
    return row and tuple(row), [tuple(j) for j in jobs], epochs, [tuple(b) for b in blocks]


async def test_records_are_applied_in_order_however_they_come(make_database: MakeDatabase) -> None:
    db = await make_database("trainer")
    chance = random.Random(3)
    for number in range(NUM_IN_POSTGRES):
        parts, ended = worker_history(chance), []
        for is_shuffled in (False, True):
            training = await claimed(db, f"v{number}-{is_shuffled}")
            records = deque[Delivered[WorkerRecord]]()
            for seq, part in enumerate(parts, 1):
                record = WorkerRecord(training=training.name, attempt=1, seq=seq)
                record.MergeFrom(part)
                subject = f"detflow.records.{training.id}.1"
                records.append(event_of(subject, training.name, seq, record))
            order = disorder(chance, records) if is_shuffled else records
            await deliver(db, "trainer-records", consumer.on_record, order)
            ended.append(await trainer_state(db, training.id))
        assert ended[0] == ended[1], number


async def claimed(db: Database, version: str) -> domain.Training:
    """Queues a training and claims it."""
    async with db.transaction() as conn:
        await store.insert_training(
            conn,
            training_id=new_id(),
            request_id="",
            plan=trainer_players.plan(version, epochs=9),
        )
        claim = await ownership.claim_training(conn, "test", timedelta(hours=1), ROOM)
    assert claim is not None and claim.training.version == version
    return claim.training


def worker_history(chance: random.Random) -> list[WorkerRecord]:
    """Makes up the records of an attempt."""
    parts = [WorkerRecord(started=WorkerStarted(first_epoch=1, device="cpu"))]
    stored = StoredObject(key="object", size_bytes=1, sha256="00" * 32)
    for epoch in range(1, chance.randint(1, 5)):
        log = training_pb2.LogLines(attempt=1, lines=[f"epoch {epoch}"])
        metrics = training_pb2.EpochMetrics(attempt=1, epoch=epoch, values={"lr": chance.random()})
        checkpoint = Checkpoint(epoch=epoch, object=stored)
        parts.append(WorkerRecord(log=log))
        parts.append(WorkerRecord(epoch=EpochRecord(metrics=metrics, checkpoint=checkpoint)))
    if chance.random() < 0.5:
        parts.append(WorkerRecord(evaluating=WorkerEvaluating(weights=stored)))
        predictions = training_pb2.Predictions(
            attempt=1, manifest=MANIFEST, val=stored, test=stored
        )
        parts.append(WorkerRecord(finished=WorkerFinished(predictions=predictions)))
    return parts


async def trainer_state(db: Database, id_: str) -> tuple[Any, ...]:
    """Returns what the trainer has of a training and what it has told of it, without names."""
    async with db.connection() as conn:
        row = await conn.fetchrow(
            "select state, revision, attempt, num_epochs_done, weights from training where id = $1",
            id_,
        )
        checkpoints = await conn.fetch(
            "select attempt, epoch, step from checkpoint where training_id = $1 order by epoch", id_
        )
        rows = await conn.fetch(
            "select payload from outbox where resource = $1 order by seq", f"training.{id_}"
        )
    events = [events_pb2.Event.FromString(event["payload"]) for event in rows]
    told = [
        (event.training.state, event.training.revision)
        if event.HasField("training")
        else event.SerializeToString(deterministic=True)
        for event in events
    ]
    return row and tuple(row), [tuple(checkpoint) for checkpoint in checkpoints], told
