"""Clocks that jump by an hour, and a NATS whose disk is full."""

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from detflow.events import EVENTS_STREAM, Bus
from detflow.local import nats
from detflow.outbox import Relay, append
from detflow.postgres import Database
from detflow.v1 import events_pb2
from tests.background import running
from tests.deployment_rig import eventually
from tests.trainer_rig import FAST, Rig, rig

__all__ = ["rig"]
ROOT = Path(__file__).parent.parent.parent
NUM_EVENTS = 60

# Who may look at the clock on the wall. Leases, deadlines and pauses go by the database's clock or
# by one that never jumps.
ON_THE_WALL = {
    "detflow/audit.py": "when something was done, to be read by people",
    "detflow/backup": "the name of a backup",
    "detflow/cli": "how long something takes, on the screen",
    "detflow/client": "when a key shall expire, as asked for",
    "detflow/doctor.py": "certificates, and whether this clock and the database's agree",
    "detflow/identities.py": "whether a token has expired: its issuer has no other clock either",
    "detflow/store.py": "the age of files, by the clock that dated them, within an hour's patience",
    "services/metrics/webhooks/consumer.py": "an event of an old release that brings no time",
    "services/trainer/worker/training.py": "when an epoch was measured, to be read by people",
    "services/version/access_service.py": "whether the expiry of a new key lies ahead",
}


def test_nothing_that_must_hold_goes_by_the_clock_on_the_wall() -> None:
    looks = re.compile(r"\btime\.time\(|datetime\.now\(|\.utcnow\(|\.GetCurrentTime\(")
    for package in ("detflow", "services", "gateway"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if looks.search(path.read_text()) and not name.endswith("_pb2.py"):
                is_known = any(name.startswith(known) for known in ON_THE_WALL)
                assert is_known, f"{name} looks at a clock that jumps: say here why it may"


@pytest.mark.parametrize("hours", [1, -1])
async def test_attempt_lives_on_and_is_taken_over_in_time_though_the_clock_jumps(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    training, puppet = await rig.running()
    wall = time.time

    def shifted() -> float:
        # gRPC's core, to which its Python part tells deadlines, still has the true time.
        is_told_to_core = sys._getframe(1).f_globals["__name__"].startswith("grpc")
        return wall() + (0.0 if is_told_to_core else 3600.0 * hours)

    monkeypatch.setattr(time, "time", shifted)
    begin = time.monotonic()
    number = 0
    while time.monotonic() - begin < 2 * FAST.lease:
        number += 1
        await puppet.epoch(number)
        await rig.until_epochs(training.name, number)
    assert (await rig.get(training.name)).attempt == 1
    puppet.kill()
    second = await rig.puppet()
    assert (second.attempt, second.hello["checkpoint"]) == (2, number)


async def test_events_wait_while_the_disk_of_nats_is_full_and_none_is_lost(
    make_database: Callable[[str], Awaitable[Database]], tmp_path: Path
) -> None:
    db = await make_database("version")
    server = nats.prepare(tmp_path / "nats")
    path = server.directory / "nats.conf"
    told = json.loads(path.read_text())
    small = {**told, "jetstream": {**told["jetstream"], "max_file_store": 30_000}}
    path.write_text(json.dumps(small))
    process = server.start(tmp_path / "nats.log")
    bus = await Bus.connect(server.url, "test")
    try:
        await bus.ensure_streams()

        async def num_waiting() -> int:
            async with db.connection() as conn:
                found: int = await conn.fetchval(
                    "select count(*) from outbox where publish_time is null"
                )
            return found

        async with running(Relay(db, bus, "test").run()):
            for number in range(NUM_EVENTS):
                async with db.transaction() as conn:
                    event = events_pb2.Event()
                    event.version.display_name = "x" * 1000
                    await append(
                        conn,
                        kind="version",
                        resource_id="a",
                        what=f"told{number}",
                        name="projects/p/versions/a",
                        event=event,
                    )
            waiting = await eventually(num_waiting, lambda found: found < NUM_EVENTS)
            assert waiting > 0
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)
            path.write_text(json.dumps(told))
            process = await asyncio.to_thread(server.start, tmp_path / "nats.log")
            await eventually(num_waiting, lambda found: found == 0)
        first, last = await bus.stream_bounds(EVENTS_STREAM)
        assert last - first + 1 == NUM_EVENTS
        assert await bus.last_seq("detflow.v1.version.a.>") == NUM_EVENTS
    finally:
        await bus.close()
        process.kill()
        await asyncio.to_thread(process.wait)
