"""Jobs for what one of several trainer processes has taken on: they end when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from google.protobuf.message import Message

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.events import Bus
from detflow.tasks import cancel_all, wait
from detflow.v1.worker_pb2 import JobMessage

log = telemetry.get_logger(__name__)


async def run_while_owned(
    job: Awaitable[JobMessage],
    is_ours: Callable[[], Awaitable[bool]],
    wake: asyncio.Event,
    tick: float,
) -> JobMessage | None:
    """Runs a job to its end, or ends it when it is somebody else's or nobody's any more.

    Args:
        job: The job; cancelled if this is.
        is_ours: Renews the lease; asked when there is news, and every tick.
        wake: Set when there may be news.
        tick: Seconds.

    Returns:
        The job's result; None if it was ended.
    """
    task = asyncio.ensure_future(job)
    try:
        while not task.done():
            wake.clear()
            if not await is_ours():
                return None
            news = asyncio.create_task(wait(wake, tick))
            await asyncio.wait([task, news], return_when=asyncio.FIRST_COMPLETED)
            await cancel_all([news])
        return task.result()
    finally:
        await cancel_all([task])


@contextlib.asynccontextmanager
async def reporting(bus: Bus, subject: str) -> AsyncIterator[Callable[[Message], None]]:
    """Gives what takes progress; the newest is published on core NATS."""
    reporter = _Reporter(bus, subject)
    task = asyncio.create_task(reporter.run())
    try:
        yield reporter.hear
    finally:
        await cancel_all([task])


class _Reporter:
    def __init__(self, bus: Bus, subject: str) -> None:
        self._bus = bus
        self._subject = subject
        self._newest = b""
        self._news = asyncio.Event()

    def hear(self, progress: Message) -> None:
        self._newest = progress.SerializeToString()
        self._news.set()

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._bus.publish(self._subject, self._newest)
            except Unavailable:  # progress is a courtesy; the work goes on
                log.debug("progress lost", subject=self._subject)
