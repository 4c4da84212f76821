"""A kill at every place there is, once, under one user who gets everything all the same."""

import asyncio
import random
from pathlib import Path

import pytest

from detflow import faults
from tests.chaos.campaign import PLACES
from tests.chaos.checks import check_all
from tests.chaos.system import Plans, hurt
from tests.chaos.users import Users
from tests.deployment_rig import SERVICES, import_dataset, write_archive

IN_THE_REAL_WORKER = {
    "checkpoint.before_store",
    "checkpoint.after_store",
    "checkpoint.after_record",
}


def test_every_place_is_in_a_scenario() -> None:
    planned = {place for places in PLACES.values() for place in places}
    assert planned | IN_THE_REAL_WORKER == set(faults.POINTS)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_kill_at_every_place_costs_one_user_nothing(tmp_path: Path) -> None:
    archive = await asyncio.to_thread(write_archive, tmp_path, 12)
    plans = Plans()
    planned = {name: {f"{place}:kill:1" for place in PLACES[name]} for name in SERVICES}

    def left(name: str) -> str:
        return ",".join(sorted(planned[name] - plans.happened(name)))

    async with hurt(tmp_path, plans, lease_seconds=3.0) as system:
        dataset = await import_dataset(system, archive, "shapes")
        plans.next = left
        users = Users(system, random.Random(0), dataset)
        for name in SERVICES:
            assert system.kill(name)
        number = 0
        async with asyncio.timeout(300):
            while any(left(name) for name in SERVICES):
                number += 1
                # Two at a time wait for one of the slots: what waits is tried in the queue.
                await asyncio.gather(
                    *(users.see(3 * number + k) for k in range(3)), users.upload(number)
                )
                plans.collect_all()
        assert users.done()["trainings SUCCEEDED"] == len(users.promised.trainings)
        plans.next = lambda name: ""
        for name in SERVICES:  # those that have nothing planned any more, too
            assert system.kill(name)
        await system.until_serving()
        watching = [asyncio.create_task(users.watch()), asyncio.create_task(users.watch_by_http())]
        await check_all(system, users)
        for task in watching:
            task.cancel()
    for name in SERVICES:
        assert planned[name] <= plans.happened(name)
