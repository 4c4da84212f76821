"""The processes that decode and encode images."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import aclosing
from typing import TypeVar

from detflow.errors import ResourceExhausted
from detflow.images import use_one_thread
from services.preprocess.domain import Reason

_PR_SET_PDEATHSIG = 1
_WAITING_PER_PROCESS = 2

J = TypeVar("J")
R = TypeVar("R")


class WorkerDied(ResourceExhausted):
    """A process of the pool was killed, most likely by the system for want of memory."""


async def side_by_side(
    submit: Callable[[J], asyncio.Future[R]], jobs: AsyncIterator[J], num_at_once: int
) -> AsyncGenerator[tuple[J, R], None]:
    """Yields each job with its result as it is done; some wait so that no process has to.

    Args:
        submit: Starts a job, or has it wait.
        jobs: Taken as there is room, so there may be many.
        num_at_once: Jobs that can run at once.

    Raises:
        Exception: Whatever comes of a job; the others are abandoned.
    """
    running: dict[asyncio.Future[R], J] = {}
    more = True
    try:
        while True:
            while more and len(running) < num_at_once * _WAITING_PER_PROCESS:
                try:
                    job = await anext(jobs)
                except StopAsyncIteration:
                    more = False
                    break
                running[submit(job)] = job
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()
        # A cancelled future of a broken pool still holds its exception: look at it.
        await asyncio.gather(*running, return_exceptions=True)


class WorkerPool:
    """A pool of processes that die with this one and are replaced when one of them is killed.

    Args:
        num_processes: How many; 0 means one per core.
    """

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes or os.cpu_count() or 1
        self._executor = self._start()

    async def map(
        self, work: Callable[[J], R], jobs: AsyncIterator[J]
    ) -> AsyncGenerator[tuple[J, R], None]:
        """Runs jobs side by side; yields each with its result as it is done, in any order.

        Args:
            work: A function of a module.
            jobs: Taken as there is room, so there may be many.

        Raises:
            WorkerDied: A process was killed.
            Exception: Whatever `work` raises; the other jobs are abandoned.
        """
        loop = asyncio.get_running_loop()
        executor = self._executor

        def submit(job: J) -> asyncio.Future[R]:
            return loop.run_in_executor(executor, work, job)

        try:
            async with aclosing(side_by_side(submit, jobs, self.num_processes)) as results:
                async for result in results:
                    yield result
        except BrokenProcessPool as error:
            if executor is self._executor:
                self._executor = self._start()
            raise WorkerDied(
                "a process that decodes images was killed, most likely for want of memory;"
                " give the preprocess service more memory or fewer processes",
                reason=Reason.WORKER_DIED,
            ) from error

    async def close(self) -> None:
        """Ends the processes after the jobs they are at."""
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        # spawn: gRPC and asyncpg do not survive a fork.
        return ProcessPoolExecutor(
            self.num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(os.getpid(),),
        )


def _begin(parent: int) -> None:
    """Prepares a process: it dies with its parent, which alone hears Ctrl-C and SIGTERM."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    use_one_thread()
