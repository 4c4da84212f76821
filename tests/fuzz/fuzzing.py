"""Sends many cases to a running stack and says what came of them."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from random import Random

import psutil

from tests.fuzz.cases import NUM_CASES_AT_ONCE, Outcome, rng_of
from tests.fuzz.over_grpc import GrpcSurface
from tests.fuzz.over_http import HttpSurface
from tests.fuzz.world import World

_WARM_UP = 0.25
"""Share of the cases after which memory should no longer grow."""
_MODULES = ("services.version", "services.preprocess", "services.trainer", "services.metrics")
Send = Callable[[Random], Awaitable[Outcome]]


@dataclass
class Report:
    """What came of a run.

    Attributes:
        seconds: How long it took.
        counts: Outcomes with their number.
        problems: Case, problem and what was sent.
        memory: RSS in MiB by process, after the warm-up and at the end.
        serving: Whether each service says that it serves, at the end.
    """

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[int, Outcome]] = field(default_factory=list)
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    serving: dict[str, bool] = field(default_factory=dict)


async def run(world: World, seed: int, numbers: Iterable[int]) -> Report:
    """Sends cases: even numbers by gRPC, odd ones by HTTP.

    Args:
        world: What they are sent to.
        seed: Decides, with its number, what a case is.
        numbers: The cases.
    """
    grpc_surface = GrpcSurface(world.addresses, world.names, world.token)
    http_surface = HttpSurface(world.http_port, world.names, world.token)
    surfaces: tuple[Send, Send] = (grpc_surface.send, http_surface.send)
    report = Report()
    waiting = list(reversed(list(numbers)))
    num_cases, warm = len(waiting), dict[str, int]()

    async def work() -> None:
        while waiting:
            number = waiting.pop()
            outcome = await surfaces[number % 2](rng_of(seed, number))
            report.counts[outcome.what] += 1
            if outcome.problem:
                report.problems.append((number, outcome))
            if not warm and len(waiting) <= num_cases * (1 - _WARM_UP):
                warm.update(memory_mib(world))

    start = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(NUM_CASES_AT_ONCE, num_cases)):
                group.create_task(work())
        report.seconds = time.perf_counter() - start
        report.serving = await grpc_surface.serving()
    finally:
        await http_surface.close()
        await grpc_surface.close()
    end = memory_mib(world)
    report.memory = {name: (warm[name], end[name]) for name in warm}
    return report


def processes(world: World) -> dict[str, psutil.Process]:
    """Returns the processes of the services and the gateway by module."""
    found = {}
    for process in world.stack.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # a child of theirs that has ended
            command = process.cmdline()
            module = command[2] if command[1:2] == ["-m"] else ""
            if module in (*_MODULES, "gateway"):
                found[module] = process
    return found


def memory_mib(world: World) -> dict[str, int]:
    """Returns the memory of each service process and the gateway."""
    return {name: one.memory_info().rss >> 20 for name, one in processes(world).items()}
