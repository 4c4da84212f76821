"""Carries out one attempt: starts its worker, watches it, ends it, moves the training on."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from detflow import outbox, telemetry
from detflow.errors import Aborted, DeadlineExceeded, ResourceExhausted, Unavailable, failure
from detflow.events import RECORDS_STREAM, Bus
from detflow.postgres import Connection, Database
from detflow.tasks import wait
from detflow.v1.common_pb2 import Failure
from detflow.v1.worker_pb2 import LeaseRequest, WorkerRecord, WorkerSpec
from services.trainer import attempts, out_of_memory, ownership, store
from services.trainer.domain import ATTEMPTING, State, StopMode, Training, after_stop
from services.trainer.executors import Devices, Executor, Exit, Handle
from services.trainer.stall import Patience, ProgressClock

log = telemetry.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long the trainer waits, in seconds.

    Attributes:
        tick: Longest time between two looks at an attempt.
        lease: How long an attempt stays with an owner that is not heard of; several ticks.
        grace: Between SIGTERM and SIGKILL.
        records: For records of a worker that has ended to be applied.
        records_on_stop: The same while a user waits.
        evaluation: From the predictions to their evaluations.
        sweep: Between two looks for checkpoints to delete.
        queued: How long a training waits for a slot before it is tried in the queue.
        patience: For progress.
    """

    tick: float = 1.0
    lease: float = 15.0
    grace: float = 5.0
    records: float = 30.0
    records_on_stop: float = 2.0
    evaluation: float = 600.0
    sweep: float = 5.0
    queued: float = 2.0
    patience: Patience = field(default_factory=Patience)

    @property
    def lease_interval(self) -> datetime.timedelta:
        """The lease as the database takes it."""
        return datetime.timedelta(seconds=self.lease)

    @property
    def queued_interval(self) -> datetime.timedelta:
        """The time before a training is tried in the queue as the database takes it."""
        return datetime.timedelta(seconds=self.queued)


class Attempt:
    """One attempt of a training in this process.

    Args:
        training: As it was claimed or adopted.
        spec: What the worker is told; None for an adopted attempt whose worker is done.
        devices: What the worker gets.
        owner: Id of this trainer process.

    Attributes:
        devices: What the worker has.
        holds_slot: Its worker runs or is being started, and holds the devices.
    """

    def __init__(
        self,
        training: Training,
        spec: WorkerSpec | None,
        *,
        devices: Devices,
        db: Database,
        bus: Bus,
        executor: Executor,
        owner: str,
        deadlines: Deadlines,
    ) -> None:
        self.training_id = training.id
        self.number = training.attempt
        self.devices = devices
        self.holds_slot = spec is not None
        self._spec = spec
        self._db = db
        self._bus = bus
        self._executor = executor
        self._owner = owner
        self._deadlines = deadlines
        self._wake = asyncio.Event()
        self._released = False
        self._clock = ProgressClock(deadlines.patience)
        self._log = log.bind(training=training.name, attempt=training.attempt)

    def wake(self) -> None:
        """Has it look at the training now."""
        self._wake.set()

    def release(self) -> None:
        """Has it end its worker and give the training back: this process is shutting down."""
        self._released = True
        self._wake.set()

    def observe(self, request: LeaseRequest) -> None:
        """Takes note of how far the worker is."""
        if request.attempt == self.number:
            self._clock.observe(request.progress)

    async def run(self) -> None:
        """Carries the attempt out; then its worker is gone and the training has moved on."""

        async def last_carrier(conn: Connection) -> dict[str, str]:
            return await outbox.last_carrier(conn, f"training.{self.training_id}")

        with telemetry.span("attempt", await self._in_transaction(last_carrier)):
            await self._carry_out()

    async def _carry_out(self) -> None:
        if self._spec is not None and not await self._run_worker(self._spec):
            return
        self.holds_slot = False
        await self._wait_for_evaluation()

    async def _run_worker(self, spec: WorkerSpec) -> bool:
        """Runs the worker to its end; returns whether its predictions wait to be measured."""
        try:
            handle = await self._executor.start(spec, self.devices)
        except OSError as error:
            problem = Unavailable(
                f"the worker could not be started: {error}", reason="WORKER_NOT_STARTED"
            )
            await self._settle_crash(failure(problem))
            return False
        self._log.info("worker started")
        exited = asyncio.ensure_future(handle.wait())
        exited.add_done_callback(lambda _: self._wake.set())
        try:
            return await self._watch_worker(handle, exited)
        finally:
            exited.cancel()
            await handle.close()

    async def _watch_worker(self, handle: Handle, exited: asyncio.Future[Exit]) -> bool:
        self._clock.reset()
        while True:
            training = await self._renew()
            if training is None:
                await handle.terminate(self._deadlines.grace)
                return False
            if training.stop_mode in (StopMode.PAUSE, StopMode.DISCARD):
                await handle.terminate(self._deadlines.grace)
                if training.stop_mode is StopMode.PAUSE:
                    await self._wait_for_records(self._deadlines.records_on_stop)
                await self._stop()
                return False
            if self._released:
                await handle.terminate(self._deadlines.grace)
                await self._wait_for_records(self._deadlines.records_on_stop)
                await self._in_transaction(self._give_back)
                return False
            if exited.done():
                return await self._judge(await exited)
            if stall := self._clock.stall():
                self._log.warning("worker stalled", problem=stall.message)
                await handle.terminate(self._deadlines.grace)
                await self._wait_for_records(self._deadlines.records_on_stop)
                await self._settle_crash(failure(stall))
                return False
            await self._wait()

    async def _judge(self, end: Exit) -> bool:
        """Decides what the end of the worker means, once every record it wrote was applied."""
        self._log.info("worker ended", exit_code=end.code)
        await self._wait_for_records(self._deadlines.records)
        training = await self._renew()
        if training is None:
            return False
        if training.predictions_written:
            return True
        if end.out_of_memory:
            await self._settle_out_of_memory()
            return False
        last = end.last_lines[-1] if end.last_lines else "(it wrote nothing)"
        problem = Aborted(
            f"the worker {end.describe()} before its results were there; last line: {last}",
            reason="WORKER_DIED",
            metadata={
                "attempt": str(self.number),
                "exit_code": str(end.code),
                "last_lines": "\n".join(end.last_lines),
            },
        )
        await self._settle_crash(failure(problem))
        return False

    async def _wait_for_evaluation(self) -> None:
        """Holds the lease until metrics has measured the predictions."""
        while (training := await self._renew()) is not None:
            if training.stop_mode in (StopMode.PAUSE, StopMode.DISCARD):
                await self._stop()
                return
            if self._released:
                await self._in_transaction(self._expire)
                return
            if await self._predictions_age(training) > self._deadlines.evaluation:
                problem = DeadlineExceeded(
                    f"the predictions were not measured within {self._deadlines.evaluation:g} s;"
                    " check the metrics service, then resume the training",
                    reason="EVALUATION_MISSING",
                )
                await self._fail(failure(problem))
                return
            await self._wait()

    async def _renew(self) -> Training | None:
        """Renews the lease; None if the attempt has ended or was taken over."""

        async def renew(conn: Connection) -> Training | None:
            return await ownership.renew_lease(
                conn, self.training_id, self.number, self._owner, self._deadlines.lease_interval
            )

        training = await self._in_transaction(renew)
        if not self._bus.connected:
            self._clock.reset()  # nothing can be heard of the worker, which trains on
        if training is not None:
            self._clock.observe_state(training.state, training.num_epochs_done)
        return training

    async def _wait_for_records(self, seconds: float) -> None:
        """Waits until every record the worker has published was applied."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not await self._records_are_applied():
                    await self._wait()

    async def _records_are_applied(self) -> bool:
        subject = f"detflow.records.{self.training_id}.{self.number}"
        try:
            message = await self._bus.last_message(RECORDS_STREAM, subject)
        except Unavailable as error:
            self._log.warning("attempt waits for NATS", error=str(error))
            return False
        if message is None:
            return True
        published = WorkerRecord.FromString(message.data or b"").seq

        async def applied(conn: Connection) -> int:
            return await attempts.last_record(conn, self.training_id, self.number)

        return await self._in_transaction(applied) >= published

    async def _predictions_age(self, training: Training) -> float:
        async def age(conn: Connection) -> float:
            return await attempts.predictions_age_seconds(conn, training)

        return await self._in_transaction(age)

    async def _stop(self) -> None:
        """Completes the stop that was asked for; the mode may have become more urgent meanwhile."""

        async def stop(conn: Connection) -> None:
            training = await self._lock(conn)
            if training is not None and training.stop_mode is not None:
                target = after_stop(training.stop_mode)
                await store.update_state(conn, training.id, target, attempt=self.number)

        await self._in_transaction(stop)

    async def _settle_crash(self, why: Failure) -> None:
        async def settle(conn: Connection) -> None:
            training = await self._lock(conn)
            if training is not None:
                await store.settle_crash(conn, training, why)

        await self._in_transaction(settle)

    async def _settle_out_of_memory(self) -> None:
        problem = ResourceExhausted(
            "the system killed the worker because memory ran out; lower batch_size or image_size",
            reason=out_of_memory.REASON,
            metadata={"attempt": str(self.number)},
        )

        async def settle(conn: Connection) -> None:
            training = await self._lock(conn)
            if training is not None:
                await out_of_memory.settle_out_of_memory(conn, training, failure(problem))

        await self._in_transaction(settle)

    async def _fail(self, why: Failure) -> None:
        async def fail(conn: Connection) -> None:
            training = await self._lock(conn)
            if training is not None:
                await store.update_state(
                    conn, training.id, State.FAILED, attempt=self.number, failure=why
                )

        await self._in_transaction(fail)

    async def _give_back(self, conn: Connection) -> None:
        if await self._lock(conn) is not None:
            await ownership.release_training(conn, self.training_id, self.number)

    async def _expire(self, conn: Connection) -> None:
        if await self._lock(conn) is not None:
            await ownership.expire_lease(conn, self.training_id, self.number)

    async def _lock(self, conn: Connection) -> Training | None:
        """Locks the training if this attempt is still this process's to carry out."""
        training = await store.get_training(conn, self.training_id, lock=True)
        is_mine = (
            training is not None
            and training.state in ATTEMPTING
            and training.attempt == self.number
            and training.owner == self._owner
        )
        return training if is_mine else None

    async def _in_transaction(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Does something in the database, as soon as it is there."""
        while True:
            try:
                async with self._db.transaction() as conn:
                    return await work(conn)
            except Unavailable as error:
                self._log.warning("attempt waits for the database", error=str(error))
                await self._wait()

    async def _wait(self) -> None:
        """Waits for news of the training or its worker, at most a tick."""
        await wait(self._wake, self._deadlines.tick)
        self._wake.clear()
