"""A running trainer service with nothing but exports, whose jobs the test does or has done."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detflow import channels
from detflow.postgres import Database
from detflow.server import Service
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1 import events_pb2, export_pb2, export_pb2_grpc
from detflow.v1.common_pb2 import Progress, StoredObject
from detflow.v1.worker_pb2 import JobMessage, JobSpec
from services.trainer.__main__ import MIGRATIONS, add_exports
from services.trainer.attempt import Deadlines
from services.trainer.exporter import RunJob
from services.trainer.jobs import run_job

VERSION = "projects/p/versions/v"
FAST = Deadlines(tick=0.2, lease=2.0)

Export = export_pb2.Export


@dataclass
class Job:
    """A job that the exporter asked for; the test says what becomes of it."""

    spec: JobSpec
    on_progress: Callable[[Progress], None]
    result: "asyncio.Future[JobMessage]"
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def succeed(self, objects: ObjectStore, content: bytes) -> StoredObject:
        """Stores a file as the worker does."""
        made = Export()
        made.CopyFrom(self.spec.export.export)
        made.object.CopyFrom(objects.put(self.spec.export.key, content))
        made.max_box_difference_px, made.max_confidence_difference = 0.25, 0.125
        self.result.set_result(JobMessage(export=made))
        return made.object


class Jobs:
    """Takes the place of `run_job`."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[Job] = asyncio.Queue()

    async def run(
        self, spec: JobSpec, *, settings: Settings, on_progress: Callable[[Progress], None]
    ) -> JobMessage:
        job = Job(spec, on_progress, asyncio.get_running_loop().create_future())
        self.started.put_nowait(job)
        try:
            return await job.result
        finally:
            job.ended.set()

    async def next(self) -> Job:
        """Waits for the next job."""
        return await asyncio.wait_for(self.started.get(), 20)


@dataclass
class Rig:
    """What a test of exports needs."""

    db: Database
    store: ObjectStore
    settings: Settings
    stub: "export_pb2_grpc.ExportServiceAsyncStub"
    jobs: Jobs

    async def training(
        self,
        training_id: str = "t1",
        *,
        model: str = "yolov8n",
        image_size: int = 640,
        weights: StoredObject | None = None,
        manifest: StoredObject | None = None,
        has_weights: bool = True,
    ) -> str:
        """Puts a training into the database, by default one with weights; returns its name."""
        weights = weights or StoredObject(key="w", size_bytes=1, sha256="0" * 64)
        async with self.db.connection() as conn:
            await conn.execute(
                "insert into training (id, project, version, state, model, batch_size, epochs,"
                " hyperparameters, manifest, weights, step_batch_size) values"
                " ($1, 'p', $2, 'STOPPED', $3, 16, 1, $4, $5, $6, 16)",
                training_id,
                "v",
                model,
                f'{{"image_size": {image_size}}}',
                (manifest or StoredObject(key="m")).SerializeToString(),
                weights.SerializeToString() if has_weights else None,
            )
        return f"{VERSION}/trainings/{training_id}"

    async def create(self, parent: str, request_id: str = "", **options: Any) -> export_pb2.Export:
        export = Export(**{"format": Export.ONNX, **options})
        with channels.translate():
            return await self.stub.CreateExport(
                export_pb2.CreateExportRequest(parent=parent, export=export, request_id=request_id)
            )

    async def get(self, name: str) -> export_pb2.Export:
        with channels.translate():
            return await self.stub.GetExport(export_pb2.GetExportRequest(name=name))

    async def list_exports(self, parent: str, **fields: Any) -> export_pb2.ListExportsResponse:
        with channels.translate():
            return await self.stub.ListExports(
                export_pb2.ListExportsRequest(parent=parent, **fields)
            )

    async def cancel(self, name: str) -> export_pb2.Export:
        with channels.translate():
            return await self.stub.CancelExport(export_pb2.CancelExportRequest(name=name))

    async def delete(self, name: str) -> None:
        with channels.translate():
            await self.stub.DeleteExport(export_pb2.DeleteExportRequest(name=name))

    async def watch(
        self, name: str, cursor: str = ""
    ) -> AsyncGenerator[export_pb2.WatchExportResponse, None]:
        with channels.translate():
            async for item in self.stub.WatchExport(
                export_pb2.WatchExportRequest(name=name, cursor=cursor)
            ):
                yield item

    async def download(self, name: str) -> list[Any]:
        with channels.translate():
            return [
                chunk
                async for chunk in self.stub.DownloadExport(
                    export_pb2.DownloadExportRequest(name=name)
                )
            ]

    async def until(
        self, name: str, state: "export_pb2.Export.State.ValueType", seconds: float = 30.0
    ) -> export_pb2.Export:
        """Waits for a state; fails if the export ends in another."""
        seen = Export()
        async with asyncio.timeout(seconds), contextlib.aclosing(self.watch(name)) as stream:
            async for item in stream:
                if item.HasField("export"):
                    seen = item.export
                    if seen.state == state:
                        return seen
        raise AssertionError(f"ended as {seen}")

    async def history(self, name: str) -> list[str]:
        """The states an export went through, by its events."""
        async with self.db.connection() as conn:
            rows = await conn.fetch(
                "select payload from outbox where resource = $1 order by seq",
                f"export.{name.rsplit('/', 1)[1]}",
            )
        events = [events_pb2.Event.FromString(row["payload"]) for row in rows]
        return [Export.State.Name(event.export.state) for event in events]


@contextlib.asynccontextmanager
async def trainer(
    settings: Settings, run: RunJob = run_job, deadlines: Deadlines = FAST
) -> AsyncIterator[str]:
    """Runs a trainer service with exports only in this process; yields its address."""
    service = Service("trainer", migrations=MIGRATIONS, settings=settings)

    async def serve() -> None:
        async with service as s:
            add_exports(s, deadlines, run)
            await s.serve()

    process = asyncio.create_task(serve())
    ready = asyncio.create_task(service.serving.wait())
    await asyncio.wait({process, ready}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    if process.done():
        await process
    try:
        yield service.address
    finally:
        service.stop()
        await process


@contextlib.asynccontextmanager
async def running(
    *, nats_url: str, database_url: str, folder: Path, real_jobs: bool = False
) -> AsyncIterator[Rig]:
    """Runs exports; their jobs are the test's, or real ones."""
    settings = Settings(
        database_url=database_url,
        nats_url=nats_url,
        store_url=f"file://{folder}/store",
        data_dir=folder / "data",
        drain_seconds=2,
        access="open",
    )
    jobs = Jobs()
    db = await Database.connect(database_url, "trainer", max_size=3)
    try:
        async with (
            trainer(settings, run_job if real_jobs else jobs.run) as address,
            channels.channel(address) as channel,
        ):
            yield Rig(
                db=db,
                store=ObjectStore(settings.store_url),
                settings=settings,
                stub=export_pb2_grpc.ExportServiceStub(channel),
                jobs=jobs,
            )
    finally:
        await db.close()


async def main() -> None:
    """Runs a trainer with exports as a process of its own, to be killed."""
    async with trainer(Settings.load()) as address:
        print(address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
