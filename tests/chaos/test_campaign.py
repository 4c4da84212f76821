"""Hundreds of kills at random: `make chaos` makes thousands of them."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign, Report
from tests.chaos.proxy import Proxy
from tests.chaos.system import Plans, hurt
from tests.chaos.users import Users
from tests.deployment_rig import import_dataset, write_archive

NUM_KILLS = int(os.environ.get("DETFLOW_CHAOS_KILLS", "200"))
SEED = int(os.environ.get("DETFLOW_CHAOS_SEED", "1"))
REPORT = os.environ.get("DETFLOW_CHAOS_REPORT", "")
KILLS_PER_ROUND = 100


def write(report: Report) -> None:
    """Writes what was done so far to where `make chaos` shows it."""
    if REPORT:
        Path(REPORT).write_text(f"{report.table()}\n")


@pytest.mark.slow
@pytest.mark.timeout(300 + 3 * NUM_KILLS)
async def test_nothing_promised_is_lost_however_often_everything_is_killed(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    archive = await asyncio.to_thread(write_archive, tmp_path, 12)
    networks = {"postgres": Proxy(), "nats": Proxy()}
    async with hurt(tmp_path, Plans(), networks) as system:
        dataset = await import_dataset(system, archive, "shapes")
        users = Users(system, chance, dataset)
        campaign = Campaign(system, users, chance, networks, SEED)
        await campaign.run(NUM_KILLS, max(NUM_KILLS // KILLS_PER_ROUND, 1), write)
    assert campaign.report.num_kills >= NUM_KILLS
