"""The worker's thread that talks to NATS; the training never waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Self

import nats.errors
import nats.js.errors
from nats.aio.client import Client

from detflow import faults
from detflow.v1.training_pb2 import StopMode, TrainingProgress
from detflow.v1.worker_pb2 import LeaseRequest, LeaseResponse
from services.trainer.worker.orders import Orders
from services.trainer.worker.records import Spool

_PROGRESS_SECONDS = 0.1
_LEASE_SECONDS = 1.0
_PUBLISH_SECONDS = 2.0
_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 2.0

_NATS_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError)


class Link:
    """Connection of one attempt to the trainer; while NATS is away its messages wait.

    Use as a context manager: leaving it closes the connection, whatever is still to be sent.

    Args:
        url: nats:// URL, or several separated by commas.
        training_id: Id of the training.
        attempt: The attempt that speaks.
        orders: Where replies to the lease are noted.
        spool: Records to publish.
        carrier: Trace they belong to.
    """

    def __init__(
        self,
        *,
        url: str,
        training_id: str,
        attempt: int,
        orders: Orders,
        spool: Spool,
        carrier: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._servers = url.split(",")
        self._training_id = training_id
        self._attempt = attempt
        self._orders = orders
        self._spool = spool
        self._carrier = carrier
        self._progress: TrainingProgress | None = None
        self._sent_progress: TrainingProgress | None = None
        self._client = Client()
        self._loop = asyncio.new_event_loop()
        self._written = asyncio.Event()
        self._empty = threading.Condition()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="nats", daemon=True)

    def __enter__(self) -> Self:
        self._spool.on_write(self._wake)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._spool.on_write(lambda: None)
        self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()
        self._loop.close()

    def report(self, progress: TrainingProgress) -> None:
        """Publishes progress soon; of several within a tenth of a second the newest."""
        self._progress = progress

    def flush(self, seconds: float) -> bool:
        """Waits until every record is stored; returns False if that takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        with self._empty:
            while not self._spool.is_empty and self._thread.is_alive():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._empty.wait(min(left, 0.5))
        return self._spool.is_empty

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._orders.failure = error

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._written.set)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as group:
                await self._connect()
                group.create_task(self._publish_records())
                group.create_task(self._publish_progress())
                group.create_task(self._keep_lease())
        finally:
            await self._send_progress()
            await self._client.close()

    async def _connect(self) -> None:
        while True:
            try:
                await self._client.connect(
                    self._servers,
                    name=f"worker {self._training_id}/{self._attempt}",
                    connect_timeout=_CONNECT_SECONDS,  # type: ignore[arg-type]  # fractions work
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=_RETRY_SECONDS,  # type: ignore[arg-type]
                    ping_interval=2,
                    max_outstanding_pings=2,
                    error_cb=_ignore,
                )
                return
            except _NATS_ERRORS:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _publish_records(self) -> None:
        subject = f"detflow.records.{self._training_id}.{self._attempt}"
        stream = self._client.jetstream(timeout=_PUBLISH_SECONDS)
        while True:
            if self._orders.fenced:
                self._spool.clear()
            record = self._spool.peek()
            if record is None:
                self._written.clear()
                if self._spool.is_empty:
                    with self._empty:
                        self._empty.notify_all()
                    await self._written.wait()
                continue
            message_id = f"{self._training_id}/{self._attempt}/{record.seq}"
            headers = {**self._carrier, "Nats-Msg-Id": message_id}
            try:
                faults.point("spool.before_publish")
                await stream.publish(subject, record.SerializeToString(), headers=headers)
                faults.point("spool.after_publish")
            except _NATS_ERRORS:
                # Its outcome is unknown: the same Msg-Id again, so that JetStream keeps only one.
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._spool.remove(record)

    async def _publish_progress(self) -> None:
        while True:
            await self._send_progress()
            await asyncio.sleep(_PROGRESS_SECONDS)

    async def _send_progress(self) -> None:
        newest = self._progress
        if newest is None or newest is self._sent_progress or not self._client.is_connected:
            return
        self._sent_progress = newest
        if not self._orders.fenced:
            with contextlib.suppress(*_NATS_ERRORS):  # a newer one follows
                await self._client.publish(
                    f"detflow.progress.training.{self._training_id}", newest.SerializeToString()
                )

    async def _keep_lease(self) -> None:
        subject = f"detflow.lease.{self._training_id}"
        while True:
            started = time.monotonic()
            request = LeaseRequest(attempt=self._attempt, progress=self._progress)
            try:
                reply = await self._client.request(
                    subject, request.SerializeToString(), timeout=_LEASE_SECONDS
                )
            except _NATS_ERRORS:
                pass  # NATS or the trainer is away; the training goes on
            else:
                self._obey(LeaseResponse.FromString(reply.data))
            await asyncio.sleep(max(0.0, started + _LEASE_SECONDS - time.monotonic()))

    def _obey(self, reply: LeaseResponse) -> None:
        if reply.fenced:
            self._orders.fenced = True
            self._written.set()
        elif reply.stop_mode in (StopMode.STOP_MODE_PAUSE, StopMode.STOP_MODE_DISCARD):
            self._orders.stop = True
        elif reply.stop_mode == StopMode.STOP_MODE_FINISH:
            self._orders.finish = True


async def _ignore(error: Exception) -> None:
    """Connection errors are expected here: each caller retries."""
