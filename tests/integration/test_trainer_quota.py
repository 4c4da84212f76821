"""How many trainings of a project may be under way at once."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from detflow.postgres import Database
from detflow.projects import Projects
from detflow.v1 import training_pb2
from services.trainer import ownership, queue
from services.trainer.executors import Slots
from services.trainer.queue import Room
from tests.integration.test_trainer_queue import MakeRig, insert, make_rig, queued
from tests.trainer_rig import FAST, State

__all__ = ["make_rig"]

T = training_pb2.Training
ROOM = Room(devices=("cpu", "auto"), num_nodes=1, num_slots=100, num_free=100)


@pytest.fixture
async def db(make_database: Callable[[str], Awaitable[Database]]) -> Database:
    return await make_database("trainer")


async def test_a_project_that_has_used_up_its_quota_waits_and_others_overtake_it(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Projects.__init__, "__kwdefaults__", {"quota_seconds": 0.0})
    async with make_rig(num_slots=3) as rig:
        rig.versions.quota.max_running_trainings = 1
        first = await queued(rig, "p", "v1")
        running = await rig.puppet()
        held = await queued(rig, "p", "v2", priority=100)
        found = await rig.get(held)
        assert (found.wait_reason, found.queue_position) == (T.QUOTA, 1)
        assert (await rig.get(first)).wait_reason == T.WAIT_REASON_UNSPECIFIED
        other = await queued(rig, "q", "v3")
        assert (await rig.puppet()).training == other
        assert (await rig.get(held)).state == State.QUEUED

        # A slot is free all the time; what lets it go is the end of the first.
        await running.finish()
        await rig.evaluate_both(first)
        assert (await rig.puppet()).training == held

        # Or a larger quota, without anybody telling the trainer.
        more = await queued(rig, "p", "v4")
        assert (await rig.get(more)).wait_reason == T.QUOTA
        rig.versions.quota.max_running_trainings = 2
        assert (await rig.puppet()).training == more

        # Who waits for a slot says so.
        rig.versions.quota.max_running_trainings = 0
        waiting = await queued(rig, "p", "v5")
        assert (await rig.get(waiting)).wait_reason == T.SLOT


async def test_of_many_claims_at_once_no_more_succeed_than_the_quota_allows(db: Database) -> None:
    async with db.transaction() as conn:
        await conn.execute("insert into project_quota values ('p', 2)")
        for number in range(6):
            await insert(conn, "p", f"v{number}")
        for number in range(3):
            await insert(conn, "free", f"w{number}")

    async def claim(owner: int) -> str | None:
        async with db.transaction() as conn:
            done = await ownership.claim_training(conn, f"o{owner}", FAST.lease_interval, ROOM)
            await asyncio.sleep(0)
            return done.training.project if done else None

    claimed = [await asyncio.gather(*(claim(n) for n in range(9))) for _ in range(3)]
    projects = [project for one in claimed for project in one if project]
    assert sorted(projects) == ["free"] * 3 + ["p"] * 2


async def test_places_say_what_would_start_and_behind_it_what_a_quota_holds(db: Database) -> None:
    async with db.transaction() as conn:
        await conn.execute("insert into project_quota values ('p', 2)")
        mine = [await insert(conn, "p", f"v{number}") for number in range(4)]
        other = await insert(conn, "q", "w")
        waiting = await queue.list_waiting(conn, Slots(num_cpu=1))
        held = [waiting[one].held for one in mine]
        assert held == [False, False, True, True]
        assert [waiting[one].position for one in (mine[0], other, mine[1], *mine[2:])] == [
            1,
            2,
            3,
            4,
            5,
        ]
