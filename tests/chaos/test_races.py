"""Two want different things of one row at the same moment, hundreds of times: exactly one wins."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from detflow.errors import FailedPrecondition, NotFound
from detflow.events import Delivered
from detflow.names import new_id
from detflow.postgres import Database
from detflow.v1 import common_pb2, events_pb2, metrics_pb2, training_pb2
from detflow.v1.common_pb2 import StoredObject
from services.trainer import attempts, consumer, domain, ownership, store, versions
from services.trainer.domain import State, StopMode
from tests import trainer_players
from tests.chaos.test_histories import ROOM, claimed, event_of

Work = Callable[[], Awaitable[object]]
MakeDatabase = Callable[[str], Awaitable[Database]]
NUM_ROUNDS = int(os.environ.get("DETFLOW_CHAOS_RACES", "300"))
LEASE = timedelta(hours=1)


@pytest.fixture
async def db(make_database: MakeDatabase) -> Database:
    return await make_database("trainer")


async def at_once(*works: Work) -> list[object]:
    """Does all from one barrier on; returns results and errors."""
    barrier = asyncio.Barrier(len(works))

    async def run(work: Work) -> object:
        await barrier.wait()
        return await work()

    return await asyncio.gather(*(run(work) for work in works), return_exceptions=True)


def measured(training: domain.Training, split: str) -> Delivered[events_pb2.Event]:
    evaluation = metrics_pb2.Evaluation(
        split=common_pb2.Split.Value(f"SPLIT_{split}"),
        attempt=1,
        state=metrics_pb2.Evaluation.SUCCEEDED,
    )
    subject = f"detflow.v1.evaluation.{training.id}.completed"
    return event_of(subject, "", 1, events_pb2.Event(evaluation=evaluation))


async def test_of_stop_and_completion_one_decides(db: Database) -> None:
    won = set()
    for number in range(NUM_ROUNDS):
        training = await claimed(db, f"v{number}")
        async with db.transaction() as conn:
            for state in (State.RUNNING, State.EVALUATING):
                await store.update_state(conn, training.id, state, attempt=1)
            predictions = training_pb2.Predictions(
                attempt=1, val=StoredObject(), test=StoredObject()
            )
            await attempts.update_predictions(conn, training, predictions)
            found = await store.get_training(conn, training.id)
            assert found is not None
            await consumer.on_evaluation(conn, measured(found, "VAL"))

        async def stop(name: str = training.name) -> None:
            async with db.transaction() as conn:
                found = await store.find_training(conn, name, lock=True)
                decided = domain.decide_stop(found, StopMode.DISCARD)
                assert decided.mode is StopMode.DISCARD
                await store.update_stop_mode(conn, found.id, decided.mode)

        async def complete(training: domain.Training = training) -> None:
            async with db.transaction() as conn:
                await consumer.on_evaluation(conn, measured(training, "TEST"))

        works: list[Work] = [stop, complete] if number % 2 else [complete, stop]
        refused = [e for e in await at_once(*works) if isinstance(e, BaseException)]
        async with db.connection() as conn:
            ended = await store.get_training(conn, training.id)
        assert ended is not None
        if refused:
            assert isinstance(refused[0], FailedPrecondition), refused
            assert (ended.state, ended.stop_mode) == (State.SUCCEEDED, None)
        else:  # its owner ends it as was asked
            assert (ended.state, ended.stop_mode) == (State.EVALUATING, StopMode.DISCARD)
            async with db.transaction() as conn:
                await store.update_state(conn, training.id, State.STOPPED, attempt=1)
        won.add(ended.state)
    assert won == {State.SUCCEEDED, State.EVALUATING}  # neither always wins


async def test_deletion_and_start_leave_nothing_that_goes_on(db: Database) -> None:
    outcomes = set()
    for number in range(NUM_ROUNDS):
        version = f"v{number}"
        name = f"projects/p/versions/{version}"
        deleted = event_of(f"detflow.v1.version.{version}.deleted", name, 2, events_pb2.Event())

        async def delete(event: Delivered[events_pb2.Event] = deleted) -> None:
            async with db.transaction() as conn:
                await consumer.on_version(conn, event)

        async def start(version: str = version) -> domain.Training:
            plan = trainer_players.plan(version)
            async with db.transaction() as conn:
                await versions.lock_version(conn, version)
                return await store.insert_training(
                    conn, training_id=new_id(), request_id="", plan=plan
                )

        works: list[Work] = [start, delete] if number % 2 else [delete, start]
        refused = [e for e in await at_once(*works) if isinstance(e, BaseException)]
        assert all(isinstance(error, NotFound) for error in refused), refused
        async with db.transaction() as conn:
            assert not await store.list_live(conn, version)
        outcomes.add(len(refused))
    assert outcomes == {0, 1}  # neither always comes first


async def test_of_four_claims_one_gets_the_training(db: Database) -> None:
    winners = set()
    for number in range(NUM_ROUNDS):
        async with db.transaction() as conn:
            queued = await store.insert_training(
                conn,
                training_id=new_id(),
                request_id="",
                plan=trainer_players.plan(f"v{number}"),
            )

        async def claim(owner: str) -> ownership.Claim | None:
            async with db.transaction() as conn:
                return await ownership.claim_training(conn, owner, LEASE, ROOM)

        answers = await at_once(*(lambda owner=f"owner {n}": claim(owner) for n in range(4)))
        [claimed_by] = [answer for answer in answers if answer is not None]
        assert isinstance(claimed_by, ownership.Claim), answers
        assert (claimed_by.training.id, claimed_by.training.attempt) == (queued.id, 1)
        winners.add(claimed_by.training.owner)
    assert len(winners) > 1
