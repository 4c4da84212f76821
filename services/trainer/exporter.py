"""Makes queued exports, one at a time, and begins again those whose maker died."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from detflow import faults, telemetry
from detflow.deletions import deleting
from detflow.errors import Aborted, DetflowError, Internal, Unavailable, failure
from detflow.events import Bus
from detflow.names import last_segment, new_id
from detflow.postgres import Connection, Database
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.tasks import cancel_all, wait
from detflow.v1 import export_pb2
from detflow.v1.common_pb2 import Failure, Progress
from detflow.v1.worker_pb2 import ExportJob, JobMessage, JobSpec
from services.trainer import exports, store
from services.trainer.attempt import Deadlines
from services.trainer.domain import is_retried
from services.trainer.export_domain import Export, State, after_death
from services.trainer.jobs import remove_leftovers, run_job
from services.trainer.owned_jobs import reporting, run_while_owned

log = telemetry.get_logger(__name__)

T = TypeVar("T")

_CHANNEL = "export"


class RunJob(Protocol):
    """`jobs.run_job`, or what a test puts in its place."""

    def __call__(
        self, spec: JobSpec, *, settings: Settings, on_progress: Callable[[Progress], None]
    ) -> Awaitable[JobMessage]:
        """Runs a job to its end."""


class Exporter:
    """The part of a trainer process that makes exports, beside the trainings.

    Every process runs one; they share the queue through the database and need not know each other.
    """

    def __init__(
        self,
        *,
        db: Database,
        bus: Bus,
        objects: ObjectStore,
        settings: Settings,
        deadlines: Deadlines | None = None,
        run: RunJob = run_job,
    ) -> None:
        self.owner = new_id()
        self._db = db
        self._bus = bus
        self._objects = objects
        self._settings = settings
        self._deadlines = deadlines or Deadlines()
        self._run_job = run
        self._making: Export | None = None
        self._making_task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._job_wake = asyncio.Event()
        self._draining = False
        self._closed = False
        self._database_back = float("-inf")

    async def run(self) -> None:
        """Makes exports until drained or cancelled."""
        listener = asyncio.create_task(
            self._db.hear(_CHANNEL, self._on_change, pause=self._deadlines.tick),
            name="export-listener",
        )
        try:
            await asyncio.to_thread(remove_leftovers, self._settings)
            while not self._closed:
                self._wake.clear()
                for work in (self._take_over, self._claim, self._sweep):
                    await self._retrying(work)
                await wait(self._wake, self._deadlines.tick)
        finally:
            await cancel_all([listener, *([self._making_task] if self._making_task else [])])

    async def drain(self) -> None:
        """Ends the job of this process and gives its export back to the queue."""
        self._draining = True
        if self._making_task is not None:
            await cancel_all([self._making_task])
        self._closed = True
        self._wake.set()

    async def _retrying(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does a part of the round; while the database is away it is left to the next round."""
        try:
            await work()
        except Unavailable as error:
            self._database_back = time.monotonic()
            log.warning("exporter waits for the database", error=str(error))

    async def _take_over(self) -> None:
        """Queues exports again whose owner has not renewed its lease."""
        # Right after an outage of the database nobody could renew: give the owners time to.
        if self._draining or time.monotonic() - self._database_back < self._deadlines.lease:
            return
        while True:
            async with self._db.transaction() as conn:
                made = [self._making.id] if self._making else []
                export = await exports.lock_expired(conn, self.owner, made)
                if export is None:
                    return
                log.warning("export's lease expired", export=export.name, owner=export.owner)
                died = Aborted(
                    "the trainer process that made this export is gone; export again",
                    reason="TRAINER_DIED",
                    metadata={"attempt": str(export.attempt)},
                )
                await exports.update_state(
                    conn, export, after_death(export.attempt), failure=failure(died)
                )
            await self._discard(export.attempt_folder)

    async def _claim(self) -> None:
        if self._draining or self._making is not None:
            return
        async with self._db.transaction() as conn:
            export = await exports.claim_export(conn, self.owner, self._deadlines.lease_interval)
            if export is None:
                return
            training = await store.get_training(conn, last_segment(export.training))
            assert training is not None and training.weights is not None  # the service has seen it
        message = exports.to_message(export)
        spec = JobSpec(
            export=ExportJob(
                weights=training.weights,
                export=message,
                manifest=training.manifest,
                key=f"{export.attempt_folder}/{export.file_name}",
            )
        )
        log.info("export claimed", export=export.name, attempt=export.attempt)
        self._making = export
        self._making_task = asyncio.create_task(self._make(export, spec), name="export")
        self._making_task.add_done_callback(self._on_made)

    async def _sweep(self) -> None:
        """Removes deleted exports: first their objects, then their rows."""
        async with self._db.connection() as conn:
            deleted = await exports.list_deleted(conn)
        for export in deleted:
            if self._making is not None and self._making.id == export.id:
                continue  # its job may still write
            async with deleting(self._db) as allowed:
                if not allowed or not await self._discard(export.folder):
                    return
            async with self._db.transaction() as conn:
                await exports.delete_export(conn, export.id)

    async def _make(self, export: Export, spec: JobSpec) -> None:
        """Runs the job of an export and settles what comes of it."""
        try:
            made = await self._run_while_owned(export, spec)
            if made is None:
                log.info("export is not ours any more", export=export.name)
                return
            faults.point("export.before_store")
            await self._settle(export, State.SUCCEEDED, made=made)
            faults.point("export.after_store")
        except DetflowError as error:
            why = failure(error)
            target = after_death(export.attempt) if is_retried(why) else State.FAILED
            log.warning("export failed", export=export.name, error=str(error), next=target)
            await self._settle(export, target, why=why)
        except OSError as error:
            log.error("export job not started", export=export.name, exc_info=error)
            why = failure(
                Unavailable("the export's process could not be started", reason="JOB_NOT_STARTED")
            )
            await self._settle(export, after_death(export.attempt), why=why)
        except asyncio.CancelledError:
            if self._draining:
                await self._give_back(export)
            raise
        finally:
            await self._discard_unless_kept(export)

    async def _run_while_owned(self, export: Export, spec: JobSpec) -> export_pb2.Export | None:
        """Runs the job; None if the export was cancelled or another has taken over meanwhile."""
        async with reporting(self._bus, f"detflow.progress.export.{export.id}") as hear:
            message = await run_while_owned(
                self._run_job(spec, settings=self._settings, on_progress=hear),
                lambda: self._is_ours(export),
                self._job_wake,
                self._deadlines.tick,
            )
        if message is None:
            return None
        if not message.HasField("export"):
            raise Internal("the export job answered something else", reason="JOB_BROKEN")
        return message.export

    async def _is_ours(self, export: Export) -> bool:
        """Renews the lease; while the database is away nobody else can take it either."""
        try:
            async with self._db.connection() as conn:
                return await exports.renew_lease(conn, export, self._deadlines.lease_interval)
        except Unavailable as error:
            self._database_back = time.monotonic()
            log.warning("export's lease not renewed", export=export.name, error=str(error))
            return True

    async def _settle(
        self,
        export: Export,
        target: State,
        *,
        made: export_pb2.Export | None = None,
        why: Failure | None = None,
    ) -> Export | None:
        async def settle(conn: Connection) -> Export | None:
            return await exports.update_state(conn, export, target, made=made, failure=why)

        return await self._in_transaction(settle)

    async def _give_back(self, export: Export) -> None:
        with contextlib.suppress(Unavailable):  # its lease runs out then
            async with self._db.transaction() as conn:
                await exports.update_state(conn, export, State.QUEUED, gives_back=True)

    async def _in_transaction(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Does something in the database, as soon as it is there."""
        while True:
            try:
                async with self._db.transaction() as conn:
                    return await work(conn)
            except Unavailable as error:
                log.warning("export waits for the database", error=str(error))
                await asyncio.sleep(self._deadlines.tick)

    async def _discard_unless_kept(self, export: Export) -> None:
        """Deletes what an attempt stored, unless the export has succeeded with it."""
        with contextlib.suppress(Unavailable):  # then it goes when the export is deleted
            async with self._db.connection() as conn:
                now = await exports.get_export(conn, export.id)
            if now is None or now.object is None:
                await self._discard(export.attempt_folder)

    async def _discard(self, prefix: str) -> bool:
        """Deletes the objects under a prefix; says whether that worked."""
        try:
            for key in await asyncio.to_thread(lambda: list(self._objects.list(prefix))):
                await asyncio.to_thread(self._objects.delete, key)
        except Exception as error:
            # Whatever the object store's trouble is, it must not keep exports from being made.
            log.warning("export's objects not deleted", prefix=prefix, error=repr(error))
            return False
        return True

    def _on_made(self, task: asyncio.Task[None]) -> None:
        export, self._making, self._making_task = self._making, None, None
        self._wake.set()
        if not task.cancelled() and (error := task.exception()):
            # Its lease runs out, and it is begun again like that of any dead owner.
            log.error("export broke off", export=export and export.name, exc_info=error)

    def _on_change(self, export_id: str) -> None:
        """Wakes the loop and the job when an export changes, in whichever process."""
        self._wake.set()
        self._job_wake.set()
