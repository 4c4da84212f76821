"""Hands queued trainings to free slots and takes over what an owner that died has left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from detflow import faults, telemetry
from detflow.errors import Aborted, Unavailable, failure
from detflow.events import Bus
from detflow.names import new_id
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.tasks import cancel_all, wait
from detflow.v1.worker_pb2 import LeaseRequest, WorkerSpec
from services.trainer import ownership, store
from services.trainer.attempt import Attempt, Deadlines
from services.trainer.domain import ATTEMPTING, Training
from services.trainer.executors import Device, Devices, Executor
from services.trainer.messages import worker_spec
from services.trainer.places import Places
from services.trainer.queue import Room, devices_on
from services.trainer.queued_preflights import QueuedPreflights
from services.trainer.sweep import Sweeper

log = telemetry.get_logger(__name__)

_CHANNEL = "training"
_DRAIN_SECONDS = 15.0


class Scheduler:
    """The part of a trainer process that carries out trainings.

    Every process runs one; they share the queue through the database and need not know each other.
    """

    def __init__(
        self,
        *,
        db: Database,
        bus: Bus,
        objects: ObjectStore,
        executor: Executor,
        preflights: QueuedPreflights,
        deadlines: Deadlines | None = None,
    ) -> None:
        self.owner = new_id()
        self._db = db
        self._bus = bus
        self._executor = executor
        self._deadlines = deadlines or Deadlines()
        self._attempts: dict[asyncio.Task[None], Attempt] = {}
        self._wake = asyncio.Event()
        self._draining = False
        self._closed = False
        self._database_back = float("-inf")
        self._sweeper = Sweeper(db, objects)
        self._swept = float("-inf")
        self._places = Places(db, bus, executor)
        self._preflights = preflights

    def observe(self, training_id: str, request: LeaseRequest) -> None:
        """Passes a lease request to the attempt it comes from, if that is carried out here."""
        for attempt in self._attempts.values():
            if attempt.training_id == training_id:
                attempt.observe(request)

    async def run(self) -> None:
        """Schedules until drained or cancelled."""
        listener = asyncio.create_task(
            self._db.hear(_CHANNEL, self._on_change, pause=self._deadlines.tick),
            name="training-listener",
        )
        try:
            await self._retrying(self._settle_leftovers)
            while not self._closed:
                self._wake.clear()
                await self._retrying(self._take_over)
                await self._retrying(self._claim)
                await self._retrying(self._preflights.claim)
                await self._retrying(self._places.announce)
                await self._retrying(self._sweep)
                await wait(self._wake, self._deadlines.tick)
        finally:
            await cancel_all([listener, *self._attempts])
            await self._preflights.drain()

    async def drain(self) -> None:
        """Ends the workers of this process and gives their trainings back to the queue."""
        self._draining = True
        for attempt in self._attempts.values():
            attempt.release()
        await self._preflights.drain()
        if self._attempts:
            await asyncio.wait(list(self._attempts), timeout=_DRAIN_SECONDS)
        self._closed = True
        self._wake.set()

    async def _retrying(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does a part of the round; while the database is away it is left to the next round."""
        try:
            await work()
        except Unavailable as error:
            self._database_back = time.monotonic()
            log.warning("scheduler waits for the database", error=str(error))

    async def _claim(self) -> None:
        for device in Device:
            while not self._draining and (room := self._room(device)).num_free > 0:
                async with self._db.transaction() as conn:
                    claim = await ownership.claim_training(
                        conn, self.owner, self._deadlines.lease_interval, room
                    )
                if claim is None:
                    break
                training = claim.training
                devices = Devices(
                    device=device,
                    num_nodes=training.num_nodes,
                    num_per_node=training.num_devices_per_node,
                )
                faults.point("training.after_claim")
                log.info("training claimed", training=training.name, attempt=training.attempt)
                self._carry_out(training, worker_spec(training, claim.checkpoint, device), devices)

    def _room(self, device: Device) -> Room:
        """Returns the slots of a kind, and how many of them are free."""
        slots = self._executor.slots
        taken = sum(
            attempt.devices.num_slots
            for attempt in self._attempts.values()
            if attempt.holds_slot and attempt.devices.device is device
        )
        return Room(
            devices=devices_on(device, slots),
            num_nodes=slots.num_nodes,
            num_slots=slots.of(device),
            num_free=slots.of(device) - taken,
        )

    async def _take_over(self) -> None:
        """Settles attempts whose owner has not renewed its lease."""
        # Right after an outage of the database nobody could renew: give the owners time to.
        if self._draining or time.monotonic() - self._database_back < self._deadlines.lease:
            return
        while True:
            async with self._db.transaction() as conn:
                carried_out = [attempt.training_id for attempt in self._attempts.values()]
                training = await ownership.lock_expired(conn, self.owner, carried_out)
                if training is None:
                    return
                log.warning(
                    "lease expired",
                    training=training.name,
                    attempt=training.attempt,
                    owner=training.owner,
                )
                adopted = training.predictions_written and training.stop_mode is None
                if adopted:
                    await ownership.adopt_training(
                        conn, training, self.owner, self._deadlines.lease_interval
                    )
                else:
                    lost = Aborted(
                        "the trainer process that ran this attempt is gone",
                        reason="TRAINER_DIED",
                        metadata={"attempt": str(training.attempt)},
                    )
                    await store.settle_crash(conn, training, failure(lost))
            if adopted:
                self._carry_out(training, None)
            await self._executor.discard(training.id, training.attempt)

    async def _sweep(self) -> None:
        """Deletes what nothing needs any more, from time to time."""
        if time.monotonic() - self._swept < self._deadlines.sweep:
            return
        self._swept = time.monotonic()
        await self._sweeper.sweep()

    async def _settle_leftovers(self) -> None:
        """Removes what attempts of an earlier process have left here, once they are over.

        One that is not over in the database, but whose trainer and worker are known to be dead,
        loses its lease at once: nobody has to wait until it runs out.
        """
        for training_id, number in await self._executor.list_leftovers():
            abandoned = await self._executor.is_abandoned(training_id, number)
            async with self._db.transaction() as conn:
                training = await store.get_training(conn, training_id, lock=True)
                over = (
                    training is None
                    or training.attempt != number
                    or training.state not in ATTEMPTING
                )
                if abandoned and not over:
                    log.info("attempt was abandoned", training_id=training_id, attempt=number)
                    await ownership.expire_lease(conn, training_id, number)
            if over:
                await self._executor.discard(training_id, number)

    def _carry_out(
        self, training: Training, spec: WorkerSpec | None, devices: Devices | None = None
    ) -> None:
        attempt = Attempt(
            training,
            spec,
            devices=devices or Devices(),
            db=self._db,
            bus=self._bus,
            executor=self._executor,
            owner=self.owner,
            deadlines=self._deadlines,
        )
        task = asyncio.create_task(attempt.run(), name=f"attempt {training.id}/{training.attempt}")
        self._attempts[task] = attempt
        task.add_done_callback(self._on_attempt_done)

    def _on_attempt_done(self, task: asyncio.Task[None]) -> None:
        attempt = self._attempts.pop(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()):
            # Its lease runs out, and the training is taken over like that of any dead owner.
            log.error("attempt failed", training=attempt.training_id, exc_info=error)

    def _on_change(self, training_id: str) -> None:
        """Wakes the loop and the attempts when a training changes, in whichever process."""
        self._places.outdate()
        self._preflights.wake(training_id)
        self._wake.set()
        for attempt in self._attempts.values():
            if attempt.training_id == training_id:
                attempt.wake()
