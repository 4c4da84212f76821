"""From the worker's publish to the watchers: gRPC, and SSE through the gateway, in one run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from detflow.events import Bus
from detflow.names import last_segment
from detflow.v1 import trainer_pb2, trainer_pb2_grpc, training_pb2, worker_pb2
from tests.benchmarks import rig

_PROGRESS_SECONDS = 0.15  # above the 0.1 s at which a watcher's progress is thinned out
_RECORD_SECONDS = 0.2


class _Watched:
    """What one watcher has received: seconds from publish to receipt, by kind."""

    def __init__(self) -> None:
        self.latencies: dict[str, list[float]] = {"progress": [], "record": []}
        self.opened = asyncio.Event()  # the snapshot is there: what is published now arrives
        self._arrived = asyncio.Event()

    def add(self, kind: str, seconds: float) -> None:
        self.latencies[kind].append(seconds)
        self._arrived.set()

    def clear(self) -> None:
        for values in self.latencies.values():
            values.clear()

    async def until(self, num_records: int) -> None:
        """Waits for so many records: all that were published, for none is left out."""
        async with asyncio.timeout(30):
            while len(self.latencies["record"]) < num_records:
                self._arrived.clear()
                await self._arrived.wait()


def run(quick: bool = False) -> dict[str, Any]:
    """Plays the worker of a training on the real stack and watches it in two ways at once.

    Publisher and watchers share a process, so one clock times both ends. Progress goes over core
    NATS; records over JetStream, the trainer's transaction, its outbox and JetStream again.

    Args:
        quick: 20 messages of each kind instead of 300.

    Returns:
        For progress and record, by gRPC and by SSE: p50 and p99 in milliseconds, and how many came.
    """
    return asyncio.run(_run(20 if quick else 300))


async def _run(count: int) -> dict[str, Any]:
    async with rig.running(idle_worker=True) as stack:
        started = await asyncio.to_thread(
            lambda: stack.client.trainings.start(stack.version, model="yolov8n")
        )
        bus = await Bus.connect(stack.nats_url, "benchmark")
        try:
            worker = Worker(bus, started.name)
            await worker.begin(stack)
            sides = {"gRPC": _Watched(), "SSE": _Watched()}
            watchers = [
                asyncio.create_task(_watch_grpc(stack, started.name, sides["gRPC"])),
                asyncio.create_task(_watch_sse(stack, started.name, sides["SSE"])),
            ]
            await asyncio.gather(*(side.opened.wait() for side in sides.values()))
            for number in range(1, 6):  # until everything is imported and cached
                await worker.record()
                await asyncio.gather(*(side.until(number) for side in sides.values()))
            for side in sides.values():
                side.clear()
            await asyncio.gather(
                worker.repeat(worker.progress, count, _PROGRESS_SECONDS),
                worker.repeat(worker.record, count, _RECORD_SECONDS),
            )
            await asyncio.gather(*(side.until(count) for side in sides.values()))
            for task in watchers:
                task.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
        finally:
            await bus.close()
    return {
        f"{kind} to {name}": {
            "p50_ms": round(rig.percentile(side.latencies[kind], 50) * 1000, 2),
            "p99_ms": round(rig.percentile(side.latencies[kind], 99) * 1000, 2),
            "received": len(side.latencies[kind]),
            "sent": count,
        }
        for kind in ("progress", "record")
        for name, side in sides.items()
    }


class Worker:
    """Publishes as a training worker does; the time of publishing travels in the message."""

    def __init__(self, bus: Bus, training: str) -> None:
        self._bus = bus
        self._training = training
        self._id = last_segment(training)
        self._seq = 0
        self._step = 0

    async def begin(self, stack: rig.Rig) -> None:
        """Waits until the trainer has started the worker process, then says it is running."""
        async with stack.channel(3) as channel:
            stub = trainer_pb2_grpc.TrainerServiceStub(channel)
            async for message in stub.WatchTraining(
                trainer_pb2.WatchTrainingRequest(name=self._training)
            ):
                if message.training.state == training_pb2.Training.PROVISIONING:
                    break
        started = worker_pb2.WorkerStarted(first_epoch=1, device="cpu")
        await self.publish(worker_pb2.WorkerRecord(started=started))

    async def repeat(
        self, publish: Callable[[], Awaitable[None]], count: int, seconds: float
    ) -> None:
        """Publishes `count` times, about `seconds` apart but never in step with anything."""
        for _ in range(count):
            await publish()
            await asyncio.sleep(seconds * random.uniform(0.8, 1.4))

    async def progress(self) -> None:
        """Publishes progress and, as a worker does, says that it lives."""
        self._step += 1
        progress = training_pb2.TrainingProgress(
            attempt=1,
            stage="train",
            epoch=1,
            num_epochs=1,
            step=self._step,
            num_steps=1000,
            elapsed_seconds=time.perf_counter(),
        )
        await self._bus.publish(
            f"detflow.progress.training.{self._id}", progress.SerializeToString()
        )
        lease = worker_pb2.LeaseRequest(attempt=1, progress=progress)
        await self._bus.publish(f"detflow.lease.{self._id}", lease.SerializeToString())

    async def record(self) -> None:
        """Publishes a record: one log line."""
        log = training_pb2.LogLines(attempt=1, lines=[repr(time.perf_counter())])
        await self.publish(worker_pb2.WorkerRecord(log=log))

    async def publish(self, record: worker_pb2.WorkerRecord) -> None:
        """Publishes a record, which is kept."""
        self._seq += 1
        record.training, record.attempt, record.seq = self._training, 1, self._seq
        await self._bus.publish_durable(
            f"detflow.records.{self._id}.1",
            record.SerializeToString(),
            {"Nats-Msg-Id": f"{self._id}/1/{self._seq}"},
        )


async def _watch_grpc(stack: rig.Rig, training: str, into: _Watched) -> None:
    async with stack.channel(3) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        async for message in stub.WatchTraining(trainer_pb2.WatchTrainingRequest(name=training)):
            now = time.perf_counter()
            into.opened.set()
            if message.HasField("progress"):
                into.add("progress", now - message.progress.elapsed_seconds)
            elif message.HasField("log"):
                into.add("record", now - float(message.log.lines[0]))


async def _watch_sse(stack: rig.Rig, training: str, into: _Watched) -> None:
    async with _get(stack, f"/v1/{training}:watch") as reader:
        while line := await reader.readline():
            if not line.startswith(b"data: "):  # chunk sizes, id:, event:, blank lines
                continue
            now = time.perf_counter()
            message = json.loads(line[6:])
            into.opened.set()
            if "progress" in message:
                into.add("progress", now - message["progress"]["elapsedSeconds"])
            elif "log" in message:
                into.add("record", now - float(message["log"]["lines"][0]))


@contextlib.asynccontextmanager
async def _get(stack: rig.Rig, path: str) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1 << 22)
    try:
        head = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{stack.port}\r\nAccept: text/event-stream"
            f"\r\nAuthorization: Bearer {stack.token}"
        )
        writer.write(f"{head}\r\n\r\n".encode())
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"GET {path}: {status.decode()}")
        yield reader
    finally:
        writer.close()
