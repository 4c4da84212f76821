"""Tells those that wait in the queue when their place changes."""

from __future__ import annotations

import time

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.events import Bus
from detflow.postgres import Database
from detflow.v1.training_pb2 import TrainingProgress
from services.trainer.executors import Executor
from services.trainer.queue import Waiting, list_waiting

log = telemetry.get_logger(__name__)

_STAGE = "queue"
_PAUSE_SECONDS = 1.0  # between two looks; nobody needs to know sooner how long the queue is
_LOOK_AGAIN_SECONDS = 10.0  # should a change not have been heard of


class Places:
    """The places as this process has last told them.

    Every trainer process tells the changes it sees; that a watcher hears one twice does no harm.
    """

    def __init__(self, db: Database, bus: Bus, executor: Executor) -> None:
        self._db = db
        self._bus = bus
        self._executor = executor
        self._told: dict[str, Waiting] = {}
        self._looked = float("-inf")
        self._outdated = True

    def outdate(self) -> None:
        """Takes note that a training has changed."""
        self._outdated = True

    async def announce(self) -> None:
        """Publishes the places that have changed since they were told, at most once a second."""
        idle_seconds = time.monotonic() - self._looked
        if idle_seconds < (_PAUSE_SECONDS if self._outdated else _LOOK_AGAIN_SECONDS):
            return
        self._looked = time.monotonic()
        self._outdated = False
        async with self._db.connection() as conn:
            waiting = await list_waiting(conn, self._executor.slots)
        news = {id_: one for id_, one in waiting.items() if self._told.get(id_) != one}
        self._told = waiting
        for training_id, one in news.items():
            progress = TrainingProgress(
                attempt=one.attempt, stage=_STAGE, queue_position=one.position
            )
            try:
                await self._bus.publish(
                    f"detflow.progress.training.{training_id}", progress.SerializeToString()
                )
            except Unavailable as error:
                log.warning("places in the queue not told", error=str(error))
                self._told = {}
                self._outdated = True
                return
