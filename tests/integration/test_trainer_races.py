"""Several want different things of one training at the same moment: exactly one wins."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from detflow import channels
from detflow.errors import AlreadyExists, FailedPrecondition
from detflow.events import Delivered
from detflow.names import new_id
from detflow.postgres import Connection, Database
from detflow.v1 import common_pb2, events_pb2, metrics_pb2, trainer_pb2, training_pb2
from detflow.v1.common_pb2 import StoredObject
from services.trainer import attempts, consumer, domain, ownership, store
from services.trainer.attempt import Attempt
from services.trainer.executors import Devices
from services.trainer.queue import Room
from tests import trainer_players
from tests.trainer_players import PROJECT
from tests.trainer_rig import FAST, Rig, State, executor, rig

__all__ = ["rig"]

ROUNDS = 50
OWNER = "owner of the test"
ROOM = Room(devices=("cpu", "auto"), num_nodes=1, num_slots=1, num_free=1)


async def at_once(*works: Coroutine[Any, Any, Any]) -> list[Any]:
    """Runs all from one barrier on; returns results and errors."""
    barrier = asyncio.Barrier(len(works))

    async def run(work: Coroutine[Any, Any, Any]) -> Any:
        await barrier.wait()
        return await work

    return await asyncio.gather(*(run(work) for work in works), return_exceptions=True)


def measured(training: domain.Training, split: "common_pb2.Split.ValueType") -> Any:
    """An evaluation's event as it is delivered."""
    evaluation = metrics_pb2.Evaluation(
        split=split, attempt=training.attempt, state=metrics_pb2.Evaluation.SUCCEEDED
    )
    return Delivered(
        event_id=new_id(),
        subject="",
        kind="evaluation",
        resource_id=training.id,
        what="completed",
        name="",
        seq=1,
        stream_seq=1,
        message=events_pb2.Event(evaluation=evaluation),
        carrier={},
    )


async def insert(conn: Connection, version: str) -> domain.Training:
    """Queues a training."""
    return await store.insert_training(
        conn,
        training_id=new_id(),
        request_id="",
        plan=trainer_players.plan(version),
    )


async def evaluating(rig: Rig, version: str) -> domain.Training:
    """A training of which only the test split is still to be measured, owned by the test."""
    async with rig.db.transaction() as conn:
        queued = await insert(conn, version)
        claim = await ownership.claim_training(conn, OWNER, FAST.lease_interval * 100, ROOM)
        assert claim is not None and claim.training.id == queued.id
        for state in (domain.State.RUNNING, domain.State.EVALUATING):
            moved = await store.update_state(conn, queued.id, state, attempt=1)
        assert moved is not None
        training = moved
        predictions = training_pb2.Predictions(attempt=1, val=StoredObject(), test=StoredObject())
        await attempts.update_predictions(conn, training, predictions)
        await consumer.on_evaluation(conn, measured(training, common_pb2.SPLIT_VAL))
    return training


@pytest.mark.parametrize("mode", [training_pb2.STOP_MODE_PAUSE, training_pb2.STOP_MODE_DISCARD])
async def test_stop_racing_completion_ends_in_one_state_that_both_agree_on(
    rig: Rig, mode: "training_pb2.StopMode.ValueType"
) -> None:
    ends = []
    for number in range(ROUNDS // 2):
        training = await evaluating(rig, f"v{number}")
        owner = Attempt(
            training,
            None,
            devices=Devices(),
            db=rig.db,
            bus=rig.bus,
            executor=executor(rig.settings),
            owner=OWNER,
            deadlines=FAST,
        )

        async def complete(training: domain.Training = training) -> None:
            async with rig.db.transaction() as conn:
                await consumer.on_evaluation(conn, measured(training, common_pb2.SPLIT_TEST))

        holding = asyncio.create_task(owner.run())
        answer, _ = await at_once(rig.stop(training.name, mode), complete())
        owner.wake()
        await asyncio.wait_for(holding, 10)
        ended = await rig.get(training.name)
        states = await rig.history(training.id)
        if isinstance(answer, FailedPrecondition):
            assert (answer.reason, ended.state) == ("TRAINING_NOT_LIVE", State.SUCCEEDED)
        else:
            assert answer.stop_mode == mode
            assert ended.state == {
                training_pb2.STOP_MODE_PAUSE: State.PAUSED,
                training_pb2.STOP_MODE_DISCARD: State.STOPPED,
            }.get(mode)
        assert [name for name in states if name != "EVALUATING"] == [
            *("QUEUED", "PROVISIONING", "RUNNING"),
            State.Name(ended.state),
        ]
        ends.append(ended.state)
    assert len(ends) == ROUNDS // 2


async def test_of_several_starts_at_once_exactly_one_wins(rig: Rig) -> None:
    async with rig.replica() as other:
        for number in range(ROUNDS):
            parent = f"{PROJECT}/versions/w{number}"
            rig.versions.put(parent)
            request = trainer_pb2.StartTrainingRequest(
                parent=parent, training=training_pb2.Training(model="yolov8n")
            )

            async def start(stub: Any, request: Any = request) -> Any:
                with channels.translate():
                    return await stub.StartTraining(request)

            answers = await at_once(*(start(stub) for stub in (rig.stub, other, rig.stub, other)))
            (winner,) = [a for a in answers if not isinstance(a, BaseException)]
            for refusal in answers:
                if refusal is not winner:
                    assert isinstance(refusal, AlreadyExists)
                    assert refusal.metadata["training"] == winner.name
            (only,) = (await rig.list_trainings(parent=parent)).trainings
            assert only.name == winner.name


async def test_start_racing_the_versions_deletion_leaves_nothing_live(rig: Rig) -> None:
    for number in range(ROUNDS):
        version = f"w{number}"
        parent = f"{PROJECT}/versions/{version}"
        rig.versions.put(parent)
        event = events_pb2.Event()
        event.version.name = parent
        deleted = Delivered(
            event_id=new_id(),
            subject="",
            kind="version",
            resource_id=version,
            what="deleted",
            name=parent,
            seq=2,
            stream_seq=1,
            message=event,
            carrier={},
        )

        async def delete(deleted: Any = deleted) -> None:
            async with rig.db.transaction() as conn:
                await consumer.on_version(conn, deleted)

        await at_once(rig.start(parent=parent), delete())
        for training in (await rig.list_trainings(parent=parent)).trainings:
            ended = await rig.until_state(training.name, State.STOPPED)
            assert ended.stop_mode == training_pb2.STOP_MODE_DISCARD


async def test_of_several_claims_at_once_exactly_one_gets_the_training(
    make_database: Callable[[str], Awaitable[Database]],
) -> None:
    db = await make_database("trainer")

    async def claim(owner: str) -> ownership.Claim | None:
        async with db.transaction() as conn:
            return await ownership.claim_training(conn, owner, FAST.lease_interval, ROOM)

    for number in range(ROUNDS):
        async with db.transaction() as conn:
            queued = await insert(conn, f"v{number}")
        answers = await at_once(*(claim(f"owner {n}") for n in range(4)))
        (claimed,) = [answer for answer in answers if answer is not None]
        assert (claimed.training.id, claimed.training.attempt) == (queued.id, 1)
