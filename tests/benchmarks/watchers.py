"""A thousand watchers of one training through the gateway: delay, exactness, memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil

from detflow.events import Bus
from detflow.v1 import training_pb2, worker_pb2
from tests.benchmarks import rig
from tests.benchmarks.streaming import Worker

_PROGRAMS = {"gateway": "gateway", "trainer": "idle_trainer.py", "watchers": "watching"}
_WARM_UP_EVENTS = 5


def run(quick: bool = False) -> dict[str, Any]:
    """Plays the worker of a training on the real stack and watches it a thousand times.

    Publisher and watchers read one clock of the machine. Every event is a record with a log line,
    which the trainer commits and its outbox publishes before anybody sees it.

    Args:
        quick: 50 watchers and 2 seconds for each rate.

    Returns:
        For each rate of events: delay from the worker's publish to the watchers in milliseconds,
        events lost and doubled, watchers cut off, and microseconds of CPU that each process took
        to bring one event to one watcher.
        Then the same, and megabytes of memory (RSS), four times during a steady rate.
    """
    return asyncio.run(_run(50, 2, 4) if quick else _run(1000, 20, 120))


async def _run(num_watchers: int, seconds: int, steady_seconds: int) -> dict[str, Any]:
    async with rig.running(idle_worker=True) as stack:
        started = await asyncio.to_thread(
            lambda: stack.client.trainings.start(stack.version, model="yolov8n")
        )
        bus = await Bus.connect(stack.nats_url, "benchmark")
        try:
            worker = Worker(bus, started.name)
            await worker.begin(stack)
            async with _crowd(stack, f"/v1/{started.name}:watch", num_watchers) as crowd:
                load = _Load(worker, crowd)
                await load.play(_WARM_UP_EVENTS, 1.0)  # until everything is imported and cached
                figures = {
                    f"{rate} events a second": await load.play(rate, seconds)
                    for rate in (1, 2, 5, 10)
                }
                steady = {
                    f"after {number * steady_seconds // 4} s": {
                        **await load.play(5, steady_seconds / 4),
                        "memory_mb": _memory(),
                    }
                    for number in range(1, 5)
                }
                return {
                    "watchers": num_watchers,
                    **crowd.opened,
                    **figures,
                    "steady, 5 events a second": steady,
                }
        finally:
            await bus.close()


class _Crowd:
    """The process that watches."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.opened: dict[str, Any] = {}

    async def report(self, number: int) -> dict[str, Any]:
        """Returns what all saw, once they have seen line `number`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n".encode())
        return await self.read()

    async def read(self) -> dict[str, Any]:
        """Reads what the process says next."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that watches has ended; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.asynccontextmanager
async def _crowd(stack: rig.Rig, path: str, num_watchers: int) -> AsyncIterator[_Crowd]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.watching"),
        *(str(stack.port), path, str(num_watchers)),
        env={**os.environ, "DETFLOW_TOKEN": stack.token},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        crowd = _Crowd(process)
        crowd.opened = await crowd.read()
        yield crowd
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class _Load:
    """Publishes numbered lines and asks what became of them."""

    def __init__(self, worker: Worker, crowd: _Crowd) -> None:
        self._worker = worker
        self._crowd = crowd
        self._number = 0

    async def play(self, rate: float, seconds: float) -> dict[str, Any]:
        """Publishes `rate` lines a second, evenly, and waits until all have arrived."""
        loop = asyncio.get_running_loop()
        cpu, begin = _cpu_seconds(), loop.time()
        for index in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + index / rate - loop.time()))
            self._number += 1
            line = f"{self._number} {time.monotonic():.6f}"
            log = training_pb2.LogLines(attempt=1, lines=[line])
            await self._worker.publish(worker_pb2.WorkerRecord(log=log))
        figures = await self._crowd.report(self._number)
        took = loop.time() - begin
        spent = {name: now - cpu[name] for name, now in _cpu_seconds().items()}
        return {
            **figures,
            "seconds": round(took, 1),
            "cpu_us_per_message": {
                name: round(seconds / figures["received"] * 1e6) for name, seconds in spent.items()
            },
        }


def _processes() -> dict[str, psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return {
        name: next(one for one in children if any(part.endswith(word) for part in one.cmdline()))
        for name, word in _PROGRAMS.items()
    }


def _cpu_seconds() -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in _processes().items()}


def _memory() -> dict[str, float]:
    return {
        name: round(process.memory_info().rss / 1e6, 1)
        for name, process in _processes().items()
        if name != "watchers"
    }
