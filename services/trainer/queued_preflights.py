"""Tries trainings while they wait in the queue, so that nobody waits for what must fail."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Awaitable, Callable
from typing import Protocol

from detflow import faults, telemetry
from detflow.errors import DetflowError, Internal, Unavailable, failure
from detflow.events import Bus
from detflow.names import new_id
from detflow.postgres import Connection, Database
from detflow.settings import Settings
from detflow.tasks import cancel_all
from detflow.v1.common_pb2 import Progress
from detflow.v1.training_pb2 import Preflight, TrainingProgress
from detflow.v1.worker_pb2 import JobMessage, JobSpec
from services.trainer import preflight_claims
from services.trainer.attempt import Deadlines
from services.trainer.domain import Training, is_conclusive
from services.trainer.executors import Device, Executor
from services.trainer.jobs import run_job
from services.trainer.messages import queued_preflight, queued_spec
from services.trainer.owned_jobs import reporting, run_while_owned
from services.trainer.preflight_claims import Claim
from services.trainer.queue import devices_on

log = telemetry.get_logger(__name__)

_STAGE = "preflight"
_PAUSE = datetime.timedelta(minutes=2)
_MOST_SECONDS = 1800.0  # for one; after that the others shall have their turn


class RunJob(Protocol):
    """`jobs.run_job`, or what a test puts in its place."""

    def __call__(
        self,
        spec: JobSpec,
        *,
        settings: Settings,
        on_progress: Callable[[Progress], None],
        background: bool,
    ) -> Awaitable[JobMessage]:
        """Runs a job to its end."""


class QueuedPreflights:
    """The part of a trainer process that tries trainings that wait; the scheduler drives it.

    Every process has one; they share the work through the database and need not know each other.
    """

    def __init__(
        self,
        *,
        db: Database,
        bus: Bus,
        settings: Settings,
        executor: Executor,
        deadlines: Deadlines | None = None,
        run: RunJob = run_job,
    ) -> None:
        self._db = db
        self._bus = bus
        self._settings = settings
        self._executor = executor
        self._deadlines = deadlines or Deadlines()
        self._run_job = run
        self._wakes: dict[asyncio.Task[None], tuple[str, asyncio.Event]] = {}
        self._draining = False

    def wake(self, training_id: str) -> None:
        """Has the one that tries this training look whether it still waits."""
        for tried_id, wake in self._wakes.values():
            if tried_id == training_id:
                wake.set()

    async def claim(self) -> None:
        """Begins to try what waits, as far as there is room."""
        while not self._draining and len(self._wakes) < self._settings.num_queued_preflights:
            async with self._db.transaction() as conn:
                claim = await preflight_claims.claim_preflight(
                    conn, new_id(), self._deadlines.lease_interval, self._deadlines.queued_interval
                )
            if claim is None:
                return
            log.info("training tried in the queue", training=claim.training.name)
            wake = asyncio.Event()
            task = asyncio.create_task(
                self._try(claim, wake), name=f"preflight {claim.training.id}"
            )
            self._wakes[task] = claim.training.id, wake
            task.add_done_callback(self._on_done)

    async def drain(self) -> None:
        """Ends what is tried here; other processes may try it."""
        self._draining = True
        await cancel_all(self._wakes)

    async def _try(self, claim: Claim, wake: asyncio.Event) -> None:
        """Tries one training and settles what comes of it."""
        try:
            async with asyncio.timeout(_MOST_SECONDS):
                found = await self._run_while_owned(claim, wake)
            if found is None:
                log.info("training does not wait any more", training=claim.training.name)
                await self._in_transaction(lambda conn: preflight_claims.delete_claim(conn, claim))
                return
            faults.point("preflight.before_store")
            await self._in_transaction(
                lambda conn: preflight_claims.settle_passed(conn, claim, found)
            )
        except DetflowError as error:
            await self._settle_problem(claim, error)
        except OSError as error:  # a TimeoutError too
            log.warning("preflight not done", training=claim.training.name, error=repr(error))
            await self._put_off(claim, "it could not be tried on this machine")
        except asyncio.CancelledError:
            if self._draining:
                with contextlib.suppress(Unavailable):  # then the claim runs out
                    async with self._db.transaction() as conn:
                        await preflight_claims.delete_claim(conn, claim)
            raise

    async def _run_while_owned(self, claim: Claim, wake: asyncio.Event) -> Preflight | None:
        """Runs the job; None if the training does not wait any more, or another tries it."""
        training = claim.training
        device = self._device(training)
        async with reporting(self._bus, f"detflow.progress.training.{training.id}") as hear:
            message = await run_while_owned(
                self._run_job(
                    JobSpec(preflight=queued_spec(training, device)),
                    settings=self._settings,
                    on_progress=lambda progress: hear(_told(training, progress)),
                    background=True,
                ),
                lambda: self._is_ours(claim),
                wake,
                self._deadlines.tick,
            )
        if message is None:
            return None
        if not message.HasField("preflight"):
            raise Internal("the preflight job answered something else", reason="JOB_BROKEN")
        return queued_preflight(message.preflight, device)

    def _device(self, training: Training) -> Device:
        """Returns the kind of device that the training waits for."""
        wanted = str(training.hyperparameters.get("device", "auto"))  # an old one has none
        on_gpu = wanted in devices_on(Device.CUDA, self._executor.slots)
        return Device.CUDA if on_gpu else Device.CPU

    async def _is_ours(self, claim: Claim) -> bool:
        """Renews the lease; while the database is away nobody else can take it either."""
        try:
            async with self._db.connection() as conn:
                return await preflight_claims.renew_lease(
                    conn, claim, self._deadlines.lease_interval
                )
        except Unavailable as error:
            log.warning("preflight's lease not renewed", error=str(error))
            return True

    async def _settle_problem(self, claim: Claim, error: DetflowError) -> None:
        name = claim.training.name
        if not is_conclusive(error):
            log.warning("preflight came to no result", training=name, error=str(error))
            await self._put_off(claim, error.message)
            return
        log.warning("training failed in the queue", training=name, error=str(error))
        await self._in_transaction(
            lambda conn: preflight_claims.settle_failed(conn, claim, failure(error))
        )

    async def _put_off(self, claim: Claim, problem: str) -> None:
        line = f"tried while it waits, without a result: {problem} (it is tried again)"
        await self._in_transaction(lambda conn: preflight_claims.put_off(conn, claim, _PAUSE, line))

    async def _in_transaction(self, work: Callable[[Connection], Awaitable[object]]) -> None:
        """Does something in the database, as soon as it is there."""
        while True:
            try:
                async with self._db.transaction() as conn:
                    await work(conn)
                return
            except Unavailable as error:
                log.warning("preflight waits for the database", error=str(error))
                await asyncio.sleep(self._deadlines.tick)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        training_id, _ = self._wakes.pop(task)
        if not task.cancelled() and (error := task.exception()):
            # The claim runs out, and it is tried again like that of any dead process.
            log.error("preflight broke off", training=training_id, exc_info=error)


def _told(training: Training, progress: Progress) -> TrainingProgress:
    """Returns what watchers of a training are told of its preflight."""
    return TrainingProgress(
        attempt=training.attempt,
        stage=_STAGE,
        step=int(progress.num_done),
        num_steps=int(progress.num_total),
    )
