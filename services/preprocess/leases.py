"""Work that one process claims and another takes over when the claim is not renewed."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from detflow import telemetry
from detflow.errors import DetflowError, Internal, ResourceExhausted, Unavailable
from detflow.tasks import Bell, cancel_all, wait
from services.preprocess.domain import LEASE_SECONDS
from services.preprocess.pool import WorkerDied

log = telemetry.get_logger(__name__)

POLL_SECONDS = 1.0
RETRY_SECONDS = 1.0
MAX_FAILURES = 3
"""Unexpected failures of one piece of work before it is given up."""

T = TypeVar("T")


def tell(error: Exception, work: str) -> DetflowError:
    """Says on a resource why its work was given up.

    Args:
        error: What went wrong, for the last time.
        work: What was being done, e.g. "import".
    """
    if isinstance(error, DetflowError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceExhausted(
            f"no space is left on the server for the {work}; free some and begin again",
            reason="DISK_FULL",
        )
    return Internal(f"internal error in the {work}; the log of the preprocess service has it")


class ClaimLost(Exception):
    """The work was taken over, cancelled or deleted."""


async def while_leased(renew: Callable[[], Awaitable[bool]], work: Coroutine[Any, Any, T]) -> T:
    """Does work while its lease is renewed; what was begun is cancelled if the claim is lost.

    While the database is away nobody else can claim, so the work goes on.

    Args:
        renew: Extends the lease; False if the claim is lost.
        work: What to do.

    Raises:
        ClaimLost: The claim is lost.
    """
    task = asyncio.create_task(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=LEASE_SECONDS / 4)
            if done:
                return task.result()
            try:
                renewed = await renew()
            except Unavailable as error:
                log.warning("lease waits", error=str(error))
                continue
            if not renewed and not task.done():
                raise ClaimLost
    finally:
        if not task.done():
            await cancel_all([task])
            if not task.cancelled():  # it failed while it was ending; the caller has its own reason
                log.info("abandoned work failed", error=repr(task.exception()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Claimed:
    """A piece of work this process has claimed, and what may become of the claim.

    Attributes:
        what: What is done, for people: "import" or "preprocessing".
        name: Resource it is done for.
        num_failures: Unexpected failures before.
        renew: Extends the lease; False if the claim is lost.
        release: Gives the claim back for another try: whether this one failed, and the seconds
            until then.
        fail: Gives the work up for good, with the reason.
    """

    what: str
    name: str
    num_failures: int
    renew: Callable[[], Awaitable[bool]]
    release: Callable[[bool, float], Awaitable[None]]
    fail: Callable[[DetflowError], Awaitable[None]]

    async def carry_out(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work under its lease, and settles the claim if it cannot be completed.

        Bad data (a DetflowError) is final; trouble with the work itself is tried again a few times.
        """
        bound = log.bind(work=self.what, resource=self.name)
        try:
            await while_leased(self.renew, work)
        except ClaimLost:
            bound.info("work ends: claim lost")
        except asyncio.CancelledError:  # the process drains: let another go on at once
            await self.release(False, 0.0)
            raise
        except Unavailable as error:
            bound.warning("work waits", error=error.message)
            await self.release(False, RETRY_SECONDS)
        except Exception as error:
            is_final = isinstance(error, DetflowError) and not isinstance(error, WorkerDied)
            if not is_final:
                bound.error("work failed", exc_info=error)
            if not is_final and self.num_failures + 1 < MAX_FAILURES:
                await self.release(True, RETRY_SECONDS)
                return
            reason = tell(error, self.what)
            await self.fail(reason)
            bound.info("work given up", reason=reason.reason, problems=reason.total)


class WorkLoop:
    """Does pieces of work as they come, one after the other.

    Args:
        name: For the log.
        step: Claims and does one piece; False if there was none.

    Attributes:
        bell: Rung when there is work, so that it need not wait for the next poll.
    """

    def __init__(self, name: str, step: Callable[[], Awaitable[bool]]) -> None:
        self._name = name
        self._step = step
        self.bell = Bell()

    async def run(self) -> None:
        """Works forever; a poll finds what other processes left behind."""
        while True:
            heard = self.bell.listen()
            try:
                if await self._step():
                    continue
            except Unavailable as error:
                log.warning("work waits", loop=self._name, error=str(error))
            await wait(heard, POLL_SECONDS)
