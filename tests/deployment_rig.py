"""The stack run by the test itself: each process can be killed, held away and watched for."""

import asyncio
import contextlib
import dataclasses
import threading
import zipfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from detflow import channels
from detflow.errors import Unavailable
from detflow.local.demo_data import write_dataset
from detflow.local.running import owner_token
from detflow.local.stack import stack
from detflow.local.supervisor import Program, Supervisor
from detflow.settings import Settings
from detflow.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    metrics_pb2_grpc,
    preprocess_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    training_pb2,
    version_pb2,
    version_pb2_grpc,
)
from tests.stack_rig import free_base_port

T = TypeVar("T")
PROJECT = "projects/default"
WORKER = "services.trainer.worker"
SERVICES = ("version", "preprocess", "trainer", "metrics")


class Deployment:
    """The stack under test and how a patient user calls it.

    Args:
        supervisor: Of the stack.
        port: Of its gateway.
        told: What the supervisor has said of processes that ended; it adds to it.
        token: As whom the user calls.

    Attributes:
        told: What the supervisor said of processes that ended.
    """

    def __init__(
        self, supervisor: Supervisor, port: int, told: Sequence[str] = (), *, token: str = ""
    ) -> None:
        self.supervisor = supervisor
        self.port = port
        self.told = told
        self.token = token
        calling = Settings(service_token=token)
        channel = [channels.channel(f"127.0.0.1:{port + k}", calling) for k in range(5)]
        self.versions: Any = version_pb2_grpc.VersionServiceStub(channel[1])
        self.datasets: Any = dataset_pb2_grpc.DatasetServiceStub(channel[2])
        self.preprocess: Any = preprocess_pb2_grpc.PreprocessServiceStub(channel[2])
        self.trainer: Any = trainer_pb2_grpc.TrainerServiceStub(channel[3])
        self.metrics: Any = metrics_pb2_grpc.MetricsServiceStub(channel[4])
        self._channels: list[aio.Channel] = channel

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)

    async def patiently(self, call: Callable[[], Awaitable[T]], seconds: float = 30.0) -> T:
        """Repeats a call while the service is away; anything but UNAVAILABLE is a finding."""
        async with asyncio.timeout(seconds):
            while True:
                try:
                    with channels.translate():
                        return await call()
                except Unavailable:
                    await asyncio.sleep(0.1)

    def setting(self, service: str, variable: str) -> str:
        """Reads what a running service was told."""
        return psutil.Process(self.supervisor.pids()[service]).environ()[variable]

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(self.supervisor.pids()[name])

    def worker(self) -> psutil.Process | None:
        trainer = self.supervisor.pids().get("trainer")
        if trainer is None or not psutil.pid_exists(trainer):
            return None
        for child in psutil.Process(trainer).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if WORKER in " ".join(child.cmdline()):
                    return child
        return None

    def kill(self, target: str) -> bool:
        """Kills a process; says whether there was one."""
        try:
            process = self.worker() if target == "worker" else self.process(target)
            if process is None:
                return False
            process.kill()
        except (KeyError, psutil.NoSuchProcess):
            return False
        return True

    async def training(self, name: str) -> training_pb2.Training:
        return await self.patiently(
            lambda: self.trainer.GetTraining(trainer_pb2.GetTrainingRequest(name=name))
        )

    async def version(self, name: str) -> version_pb2.Version:
        return await self.patiently(
            lambda: self.versions.GetVersion(version_pb2.GetVersionRequest(name=name))
        )

    async def health(self, service: str) -> bool:
        """Asks the gRPC health service of a process whether it serves."""
        stub: Any = health_pb2_grpc.HealthStub(self._channels[SERVICES.index(service) + 1])
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def until_training(
        self, name: str, matches: Callable[[training_pb2.Training], bool], seconds: float = 60.0
    ) -> training_pb2.Training:
        """Waits by watches for a state of a training, through whatever happens meanwhile."""
        found = await self._until(
            name, lambda m: m.HasField("training") and matches(m.training), seconds
        )
        return found.training

    async def until_epoch(self, name: str, number: int, seconds: float = 60.0) -> None:
        """Waits until an epoch is done."""
        await self._until(
            name, lambda m: max(m.epoch.epoch, m.training.num_epochs_done) >= number, seconds
        )

    async def until_attempt(self, name: str, attempt: int, seconds: float = 60.0) -> int:
        """Waits until an attempt does an epoch; returns which that is."""
        found = await self._until(
            name, lambda m: m.HasField("epoch") and m.epoch.attempt == attempt, seconds
        )
        return found.epoch.epoch

    async def _until(
        self,
        name: str,
        matches: Callable[[trainer_pb2.WatchTrainingResponse], bool],
        seconds: float,
    ) -> trainer_pb2.WatchTrainingResponse:
        """Watches with the cursor until a message matches, however often the server goes away."""
        request = trainer_pb2.WatchTrainingRequest(name=name)
        async with asyncio.timeout(seconds):
            while True:
                watch = self.trainer.WatchTraining(request)
                try:
                    with channels.translate():
                        async for message in watch:
                            request.cursor = message.cursor
                            if matches(message):
                                return cast(trainer_pb2.WatchTrainingResponse, message)
                    # It rests; a final state is told once, so begin anew.
                    request.cursor = ""
                except Unavailable:
                    pass
                finally:
                    watch.cancel()
                await asyncio.sleep(0.1)

    async def until_version(
        self, name: str, state: "version_pb2.Version.State.ValueType"
    ) -> version_pb2.Version:
        return await eventually(lambda: self.version(name), lambda version: version.state == state)


@contextlib.asynccontextmanager
async def deployed(
    data_dir: Path, port: int | None = None, gates: "Gates | None" = None
) -> AsyncIterator[Deployment]:
    """Runs the stack in this process, with its programs behind gates."""
    told: list[str] = []
    port = port or free_base_port()
    with pytest.MonkeyPatch.context() as patch:
        if gates is not None:
            patch.setattr("detflow.local.stack.Supervisor", gates.supervisor)
        async with stack(data_dir, port=port, on_event=told.append) as supervisor:
            deployment = Deployment(supervisor, port, told, token=owner_token(data_dir))
            try:
                yield deployment
            finally:
                await deployment.close()


class Gates:
    """Keeps programs that ended from being started again, for as long as a test wants."""

    def __init__(self) -> None:
        self._gates: dict[str, threading.Event] = defaultdict(_open_gate)

    @contextlib.contextmanager
    def closed(self, name: str) -> Iterator[None]:
        gate = self._gates[name]
        gate.clear()
        try:
            yield
        finally:
            gate.set()

    def supervisor(self, **arguments: Any) -> Supervisor:
        """Makes a supervisor whose programs start only while their gates are open."""
        supervisor = Supervisor(**arguments)
        start = supervisor.start

        async def start_gated(programs: Sequence[Program], **options: Any) -> None:
            await start([self._gated(program) for program in programs], **options)

        supervisor.start = start_gated  # type: ignore[method-assign]
        return supervisor

    def _gated(self, program: Program) -> Program:
        gate, before = self._gates[program.name], program.before_start

        def wait() -> None:
            assert gate.wait(timeout=60), f"nobody let {program.name} start"
            if before is not None:
                before()

        return dataclasses.replace(program, before_start=wait)


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


async def eventually(
    get: Callable[[], Awaitable[T]], done: Callable[[T], bool], seconds: float = 60.0
) -> T:
    """Waits for what has no watch; returns what was found."""
    async with asyncio.timeout(seconds):
        while not done(found := await get()):  # noqa: ASYNC110  # an RPC or a process away
            await asyncio.sleep(0.05)
        return found


async def until_gone(processes: Sequence[psutil.Process], seconds: float = 15.0) -> None:
    """Waits until processes have ended, without taking their exit codes from the supervisor."""

    async def alive() -> list[psutil.Process]:
        return [process for process in processes if _runs(process)]

    await eventually(alive, lambda found: not found, seconds)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_archive(folder: Path, num_images: int) -> Path:
    """Writes a data set of shapes and zips it."""
    write_dataset(folder / "shapes", num_images)
    archive = folder / "shapes.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((folder / "shapes").rglob("*")):
            file.write(path, path.relative_to(folder / "shapes"))
    return archive


async def import_dataset(deployment: Deployment, archive: Path, display_name: str) -> str:
    """Uploads and imports an archive; returns the name of the dataset."""
    content = await asyncio.to_thread(archive.read_bytes)

    async def requests() -> AsyncIterator[dataset_pb2.UploadArchiveRequest]:
        yield dataset_pb2.UploadArchiveRequest(parent=PROJECT)
        for start in range(0, len(content), 1 << 20):
            yield dataset_pb2.UploadArchiveRequest(chunk=content[start : start + (1 << 20)])
        yield dataset_pb2.UploadArchiveRequest(size_bytes=len(content))

    with channels.translate():
        upload = await deployment.datasets.UploadArchive(requests(), timeout=30)
        dataset = await deployment.datasets.CreateDataset(
            dataset_pb2.CreateDatasetRequest(
                parent=PROJECT,
                dataset=dataset_pb2.Dataset(display_name=display_name),
                upload=upload.name,
            )
        )
        watch = deployment.datasets.WatchDataset(dataset_pb2.WatchDatasetRequest(name=dataset.name))
        async for message in watch:
            if message.HasField("dataset"):
                dataset = message.dataset
    assert dataset.state == dataset_pb2.Dataset.READY, dataset.failure
    return str(dataset.name)


async def create_version(
    deployment: Deployment, dataset: str, display_name: str, **recipe: Any
) -> version_pb2.Version:
    """Creates a version, which is then preprocessed."""
    version = version_pb2.Version(
        display_name=display_name, dataset=dataset, recipe=version_pb2.Recipe(**recipe)
    )
    with channels.translate():
        created: version_pb2.Version = await deployment.versions.CreateVersion(
            version_pb2.CreateVersionRequest(parent=PROJECT, version=version)
        )
    return created


async def ready_version(deployment: Deployment, dataset: str, display_name: str) -> str:
    """Creates a version and waits until it can be trained."""
    version = await create_version(deployment, dataset, display_name)
    await deployment.until_version(version.name, version_pb2.Version.READY)
    return str(version.name)


async def start_training(
    deployment: Deployment, version: str, *, epochs: int = 500, image_size: int = 64
) -> training_pb2.Training:
    """Starts a training of the smallest model."""
    training = training_pb2.Training(model="yolov8n", batch_size=8, epochs=epochs)
    training.hyperparameters.update({"image_size": image_size, "seed": 1})
    with channels.translate():
        started: training_pb2.Training = await deployment.trainer.StartTraining(
            trainer_pb2.StartTrainingRequest(parent=version, training=training)
        )
    return started
