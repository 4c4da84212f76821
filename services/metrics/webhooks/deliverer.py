"""The loop that hands messages over to webhooks, again and again until they are taken.

A delivery is leased while it is sent, so that of several processes one sends it, and another does
if that one dies. Between the sending and its record lies a moment in which a kill makes the
message go out twice: receivers tell by its id.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Sequence

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.postgres import Database
from detflow.tasks import Bell, wait
from services.metrics.webhooks import delivery_store as deliveries
from services.metrics.webhooks import store
from services.metrics.webhooks.domain import SCHEDULE_SECONDS, Due, pause_seconds
from services.metrics.webhooks.sender import Sender

log = telemetry.get_logger(__name__)

_MAX_AT_ONCE = 16
_LEASE_SECONDS = 30.0  # more than an exchange can take
_POLL_SECONDS = 5.0  # how late another replica's work is seen, should that have died
_BLINK_SECONDS = 0.05  # for a delivery that is due, and just being claimed by another replica
_HOUSEKEEPING_SECONDS = 3600.0


class Deliverer:
    """Sends what is due: to each webhook one message at a time, to several webhooks at once.

    Args:
        db: Database of the service.
        sender: Posts.
        due: Rung when something may be due.
        schedule: Pauses in seconds after the first try, the second, ...; given up after the last.
        lease_seconds: After which a delivery is taken from a process that died.
    """

    def __init__(
        self,
        db: Database,
        sender: Sender,
        due: Bell,
        *,
        schedule: Sequence[float] = SCHEDULE_SECONDS,
        lease_seconds: float = _LEASE_SECONDS,
    ) -> None:
        self._db = db
        self._sender = sender
        self._due = due
        self._schedule = schedule
        self._lease_seconds = lease_seconds
        self._busy: set[str] = set()
        self._next_housekeeping = 0.0

    async def run(self) -> None:
        """Works forever; while the database is away it waits."""
        async with asyncio.TaskGroup() as group:
            while True:
                heard = self._due.listen()
                pause = _POLL_SECONDS
                try:
                    for due in await self._claim():
                        self._busy.add(due.webhook_id)
                        group.create_task(self._deliver(due))
                    pause = await self._pause()
                except Unavailable as error:
                    log.warning("webhooks wait for the database", error=str(error))
                await wait(heard, pause)

    async def _claim(self) -> list[Due]:
        room = _MAX_AT_ONCE - len(self._busy)
        if room <= 0:
            return []
        async with self._db.transaction() as conn:
            now = asyncio.get_running_loop().time()
            if now >= self._next_housekeeping:
                self._next_housekeeping = now + _HOUSEKEEPING_SECONDS
                await deliveries.delete_old(conn)
            return await deliveries.claim_due(
                conn,
                lease=uuid.uuid4().hex,
                lease_seconds=self._lease_seconds,
                busy=self._busy,
                limit=room,
            )

    async def _pause(self) -> float:
        """Returns how long to wait if nobody rings."""
        if len(self._busy) >= _MAX_AT_ONCE:
            return _POLL_SECONDS
        async with self._db.connection() as conn:
            seconds = await deliveries.seconds_to_next(conn, self._busy)
        if seconds is None:
            return _POLL_SECONDS
        return min(max(seconds, _BLINK_SECONDS), _POLL_SECONDS)

    async def _deliver(self, due: Due) -> None:
        try:
            await self._try(due)
        except Unavailable as error:
            # It is sent again when the lease is over: nobody knows now how it went.
            log.warning("webhook delivery is not recorded", webhook=due.webhook, error=str(error))
        except asyncio.CancelledError:
            with contextlib.suppress(Unavailable):
                async with self._db.connection() as conn:
                    await deliveries.give_back(conn, due)
            raise
        finally:
            self._busy.discard(due.webhook_id)
            await self._due.ring()

    async def _try(self, due: Due) -> None:
        answer = await self._sender.send(due.message)
        pause = None
        if not answer.is_taken:
            pause = pause_seconds(self._schedule, due.num_tries, answer, random.random())
        async with self._db.transaction() as conn:
            if answer.is_gone:
                await store.disable_webhook(conn, due.webhook_id)
            is_ours = await deliveries.update_tried(conn, due, answer, pause)
        log.info(
            "webhook tried",
            webhook=due.webhook,
            delivery=due.message.id,
            status=answer.status,
            tries=due.num_tries,
            next_seconds=pause,
            recorded=is_ours,
        )
