"""A seeded campaign: users work, everything is killed and cut off, then all invariants are checked.

It goes in rounds. In each, services begin their lives with faults planned for them, and other
processes are killed from outside. Then nothing is planned any more, all services are killed at
once, and what follows is timed: until they answer, until what had piled up has flowed, until
trainings go on. When the users have finished what they were at, the invariants are checked.
"""

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import psutil

from detflow.events import EVENTS_STREAM, RECORDS_STREAM, Bus
from detflow.postgres import CONNECTION_TROUBLE, Connection
from tests.chaos.checks import check_all
from tests.chaos.proxy import Proxy
from tests.chaos.system import System
from tests.chaos.users import Users
from tests.deployment_rig import SERVICES, eventually

# Where each service comes by, and how often until it happens at most.
_COMMON = {
    "postgres.before_commit": 30,
    "postgres.after_commit": 30,
    "outbox.before_publish": 8,
    "outbox.after_publish": 8,
    "consumer.before_ack": 8,
    "consumer.after_ack": 8,
}
PLACES: Mapping[str, Mapping[str, int]] = {
    "version": _COMMON,
    "preprocess": {
        **_COMMON,
        "store.before_put": 16,
        "store.half_put": 16,
        "store.after_put": 16,
        "upload.before_part": 12,
        "upload.after_part": 12,
    },
    "trainer": {
        **_COMMON,
        "store.before_put": 8,  # of its workers
        "store.half_put": 8,
        "store.after_put": 8,
        "spool.before_publish": 20,
        "spool.after_publish": 20,
        "training.after_claim": 3,
        "preflight.before_store": 2,
        "export.before_store": 1,
        "export.after_store": 1,
    },
    "metrics": {**_COMMON, "evaluation.before_store": 3, "evaluation.after_store": 3},
}
# What else than a kill can happen where.
_MILD = {
    "postgres.before_commit": ("error", "delay", "stop"),
    "outbox.before_publish": ("error", "delay", "stop"),
    "outbox.after_publish": ("error",),
    "consumer.before_ack": ("error", "delay", "stop"),
    "upload.before_part": ("enospc", "delay"),
    "spool.before_publish": ("delay", "stop"),
}
_MILD_SHARE = 0.15
_TARGETS = {"worker": 12, "nats": 3, "postgres": 1, "gateway": 3, **dict.fromkeys(SERVICES, 1)}
_FROZEN_SECONDS = 3.0
_PAUSE_SECONDS = 0.8  # at most, between two blows from outside


@dataclass
class Recovery:
    """How long things took after the last kill of a round, in seconds."""

    serving: float
    drained: float
    resumed: float


@dataclass
class Report:
    """What a campaign did and found."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    recoveries: list[Recovery] = field(default_factory=list)
    jobs: Counter[str] = field(default_factory=Counter)
    num_checks: int = 0
    seconds: float = 0.0

    @property
    def num_kills(self) -> int:
        return self.kills.total()

    def table(self) -> str:
        """Writes it as Markdown."""
        rows = [f"| seed | {self.seed} |", f"| kills | {self.num_kills} |"]
        rows += [f"| … of {name} | {n} |" for name, n in sorted(self.kills.items())]
        rows += [f"| network: {name} | {n} |" for name, n in sorted(self.cuts.items())]
        rows += [
            *(f"| {name} | {n} |" for name, n in sorted(self.jobs.items())),
            f"| rounds, each with all invariants | {self.num_checks} |",
            f"| minutes | {self.seconds / 60:.1f} |",
        ]
        for name in ("serving", "drained", "resumed"):
            found = [getattr(recovery, name) for recovery in self.recoveries]
            middle, worst = statistics.median(found), max(found)
            rows.append(f"| seconds until {name}: median, worst | {middle:.1f}, {worst:.1f} |")
        places = [f"| {name} | {n} |" for name, n in sorted(self.places.items())]
        head = ["| what | |", "|---|---|"]
        return "\n".join([*head, *rows, "", "| place | times |", "|---|---|", *places])


class Campaign:
    """Hurts a system and checks what must survive.

    Args:
        system: The system.
        users: Those who work meanwhile.
        chance: Decides what is hurt, and when.
        networks: Proxies by what is behind them.
        seed: Said in the report.
    """

    def __init__(
        self,
        system: System,
        users: Users,
        chance: random.Random,
        networks: Mapping[str, Proxy],
        seed: int,
    ) -> None:
        self.report = Report(seed)
        self._system = system
        self._users = users
        self._chance = chance
        self._networks = networks
        self._outside: Counter[str] = Counter()

    async def run(
        self, num_kills: int, num_rounds: int, on_round: Callable[[Report], None]
    ) -> None:
        """Kills so often, and checks after each round.

        Args:
            num_kills: In all rounds together, at least.
            num_rounds: Rounds.
            on_round: Told of what was done so far, after each.
        """
        begin = time.monotonic()
        work = [self._users.train, self._users.train, self._users.train, self._users.upload]
        async with asyncio.TaskGroup() as group:
            beside = [self._users.repeat(job) for job in [*work, self._users.ask]]
            beside += [self._users.watch(), self._users.watch_by_http(), self._thaw()]
            tasks = [group.create_task(one) for one in beside]
            for number in range(1, num_rounds + 1):
                await self._round(num_kills * number // num_rounds)
                self.report.seconds = time.monotonic() - begin
                self.report.jobs = self._users.done()
                on_round(self.report)
            for task in tasks:
                task.cancel()

    async def _round(self, until: int) -> None:
        self._system.plans.next = self._plan
        self._users.go.set()
        for name in SERVICES:  # from now on each life has its faults
            self._kill(name)
        while self._num_kills() < until:
            await asyncio.sleep(self._chance.uniform(0.0, _PAUSE_SECONDS))
            if self._chance.random() < 0.1:
                await self._cut()
            else:
                [target] = self._chance.choices(list(_TARGETS), list(_TARGETS.values()))
                self._kill(target)
        self.report.recoveries.append(await self._calm())
        await self._users.rest()
        await self._check()

    def _plan(self, name: str) -> str:
        """Plans what happens to a service in its next life."""
        faults = []
        for place in self._chance.sample(sorted(PLACES[name]), 3):
            action = "kill"
            if place in _MILD and self._chance.random() < _MILD_SHARE:
                action = self._chance.choice(_MILD[place])
            faults.append(f"{place}:{action}:{self._chance.randint(1, PLACES[name][place])}")
        return ",".join(faults)

    def _kill(self, target: str) -> None:
        if self._system.kill(target):
            self._outside[target] += 1

    def _num_kills(self) -> int:
        return self._outside.total() + self._system.plans.kills().total()

    async def _cut(self) -> None:
        """Hurts one network for a moment."""
        network = self._networks[self._chance.choice(sorted(self._networks))]
        how = self._chance.choice(["cut", "halve", "black hole", "slow"])
        self.report.cuts[how] += 1
        if how == "cut":
            network.cut()
        elif how == "halve":
            network.halve()
        else:
            with network.black_hole() if how == "black hole" else network.slow(0.2):
                await asyncio.sleep(self._chance.uniform(0.5, 3.0))

    async def _thaw(self) -> None:
        """Lets processes that froze themselves go on after a while."""
        while True:
            await asyncio.sleep(_FROZEN_SECONDS)
            for process in self._system.running():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() == psutil.STATUS_STOPPED:
                        process.resume()

    async def _calm(self) -> Recovery:
        """Kills all services at once, plans nothing for what follows, and times it."""
        plans = self._system.plans
        plans.next = lambda name: ""
        under_way = await self._owners()
        while armed := [name for name in SERVICES if plans.now[name]]:
            for name in armed:
                self._kill(name)
            await asyncio.sleep(0.02)
        begin = time.monotonic()
        await self._system.until_serving()
        serving = time.monotonic() - begin
        await self._until_drained()
        drained = time.monotonic() - begin
        await self._until_resumed(under_way)
        return Recovery(serving, drained, time.monotonic() - begin)

    async def _until_drained(self) -> None:
        """Waits until what was committed is published, and what was published is applied."""
        async with contextlib.AsyncExitStack() as held:
            last = {}
            for name in SERVICES:
                conn = await held.enter_async_context(self._database(name))
                last[name] = await conn.fetchval("select max(position) from outbox"), conn
            for position, conn in last.values():
                await eventually(
                    lambda position=position, conn=conn: conn.fetchval(  # type: ignore[misc]
                        "select count(*) from outbox where publish_time is null and position <= $1",
                        position,
                    ),
                    lambda waiting: waiting == 0,
                )
        async with self._bus() as bus:
            for stream in (EVENTS_STREAM, RECORDS_STREAM):
                _, end = await bus.stream_bounds(stream)
                for consumer in await bus.js.consumers_info(stream):
                    if not consumer.config.durable_name:
                        continue
                    durable = consumer.config.durable_name

                    async def applied(
                        stream: str = stream, durable: str = durable, end: int = end
                    ) -> bool:
                        info = await bus.js.consumer_info(stream, durable)
                        assert info.ack_floor is not None
                        is_idle = not info.num_pending and not info.num_ack_pending
                        return is_idle or info.ack_floor.stream_seq >= end

                    await eventually(applied, bool)

    async def _owners(self) -> dict[str, str]:
        """Returns which trainer carries each training out."""
        async with self._database("trainer") as conn:
            rows = await conn.fetch("select id, owner from training where owner is not null")
        return {row["id"]: row["owner"] for row in rows}

    async def _until_resumed(self, before: dict[str, str]) -> None:
        """Waits until no training belongs to a trainer that was killed."""

        async def left() -> list[str]:
            now = await self._owners()
            return [training for training, owner in before.items() if now.get(training) == owner]

        await eventually(left, lambda found: not found)

    async def _check(self) -> None:
        self._count()
        await check_all(self._system, self._users)
        self.report.num_checks += 1

    def _count(self) -> None:
        self._system.plans.collect_all()
        self.report.kills = self._outside + self._system.plans.kills()
        self.report.places = self._system.plans.points()

    @contextlib.asynccontextmanager
    async def _database(self, service: str) -> AsyncIterator[Connection]:
        conn = await _connect(self._system.urls[service], service)
        try:
            yield conn
        finally:
            await conn.close()

    @contextlib.asynccontextmanager
    async def _bus(self) -> AsyncIterator[Bus]:
        bus = await Bus.connect(self._system.nats_url, "chaos")
        try:
            yield bus
        finally:
            await bus.close()


async def _connect(url: str, service: str) -> Any:
    """Connects as soon as Postgres is there: it may have been killed a moment ago."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await asyncpg.connect(url, server_settings={"search_path": service})
            except CONNECTION_TROUBLE:
                await asyncio.sleep(0.05)
