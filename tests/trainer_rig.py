"""A running trainer service around puppet workers, with a version service played by the test."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from detflow import channels
from detflow.events import Bus, Header
from detflow.interceptors import Boundary
from detflow.postgres import Database
from detflow.server import Service
from detflow.settings import Settings
from detflow.v1 import (
    common_pb2,
    events_pb2,
    metrics_pb2,
    project_pb2,
    trainer_pb2,
    trainer_pb2_grpc,
    training_pb2,
    version_pb2,
    weights_pb2,
    weights_pb2_grpc,
)
from services.trainer import queued_preflights, trials
from services.trainer.__main__ import MIGRATIONS, serve
from services.trainer.attempt import Deadlines
from services.trainer.executors import Executor
from services.trainer.executors.local import LocalExecutor
from services.trainer.jobs import run_job
from services.trainer.stall import Patience
from tests.trainer_players import PROJECT, VERSION, Puppet, Versions

PUPPET = (sys.executable, str(Path(__file__).parent / "trainer_puppet.py"))
FAST = Deadlines(
    tick=0.2,
    lease=2.0,
    grace=1.0,
    records=3.0,
    records_on_stop=1.0,
    evaluation=60.0,
    sweep=0.2,
    queued=0.0,
    patience=Patience(),
)

State = training_pb2.Training.State


@dataclass
class Rig:
    """What a test of the trainer needs."""

    bus: Bus
    db: Database
    versions: Versions
    settings: Settings
    stub: "trainer_pb2_grpc.TrainerServiceAsyncStub"
    weights: "weights_pb2_grpc.WeightsServiceAsyncStub"
    hellos: "asyncio.Queue[Puppet]"
    predictions: "dict[tuple[str, int], asyncio.Event]"
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    async def puppet(self) -> Puppet:
        """Waits for the next worker."""
        return await asyncio.wait_for(self.hellos.get(), 20)

    async def start(
        self, parent: str = VERSION, request_id: str = "", **training: Any
    ) -> training_pb2.Training:
        hyperparameters = training.pop("hyperparameters", {})
        message = training_pb2.Training(**{"model": "yolov8n", "epochs": 10, **training})
        message.hyperparameters.update(hyperparameters)
        with channels.translate():
            return await self.stub.StartTraining(
                trainer_pb2.StartTrainingRequest(
                    parent=parent, training=message, request_id=request_id
                )
            )

    async def start_with(self, **hyperparameters: Any) -> training_pb2.Training:
        return await self.start(hyperparameters=hyperparameters)

    async def get(self, name: str) -> training_pb2.Training:
        with channels.translate():
            return await self.stub.GetTraining(trainer_pb2.GetTrainingRequest(name=name))

    async def stop(
        self, name: str, mode: "training_pb2.StopMode.ValueType"
    ) -> training_pb2.Training:
        with channels.translate():
            return await self.stub.StopTraining(
                trainer_pb2.StopTrainingRequest(name=name, mode=mode)
            )

    async def resume(self, name: str) -> training_pb2.Training:
        with channels.translate():
            return await self.stub.ResumeTraining(trainer_pb2.ResumeTrainingRequest(name=name))

    async def update(self, name: str, priority: int, *mask: str) -> training_pb2.Training:
        request = trainer_pb2.UpdateTrainingRequest(
            training=training_pb2.Training(name=name, priority=priority)
        )
        request.update_mask.paths.extend(mask or ["priority"])
        with channels.translate():
            return await self.stub.UpdateTraining(request)

    async def upload(
        self, content: bytes, parent: str = PROJECT, display_name: str = ""
    ) -> weights_pb2.Weights:
        header = weights_pb2.UploadWeightsHeader(parent=parent, display_name=display_name)
        size = 1 << 20
        chunks = [content[start : start + size] for start in range(0, len(content), size)]
        parts = [
            weights_pb2.UploadWeightsRequest(header=header),
            *(weights_pb2.UploadWeightsRequest(chunk=chunk) for chunk in chunks),
            weights_pb2.UploadWeightsRequest(size_bytes=len(content)),
        ]
        with channels.translate():
            return await self.weights.UploadWeights(iter(parts))

    async def list_trainings(self, **fields: Any) -> trainer_pb2.ListTrainingsResponse:
        with channels.translate():
            return await self.stub.ListTrainings(
                trainer_pb2.ListTrainingsRequest(**{"parent": VERSION, **fields})
            )

    async def watch(
        self, name: str, cursor: str = ""
    ) -> AsyncGenerator[trainer_pb2.WatchTrainingResponse, None]:
        with channels.translate():
            async for item in self.stub.WatchTraining(
                trainer_pb2.WatchTrainingRequest(name=name, cursor=cursor)
            ):
                yield item

    async def until(
        self, name: str, matches: Callable[[training_pb2.Training], bool]
    ) -> training_pb2.Training:
        """Waits by watches for a state of a training; a watch ends at each final state."""
        async with asyncio.timeout(25):
            while True:
                async with contextlib.aclosing(self.watch(name)) as stream:
                    async for item in stream:
                        if item.HasField("training") and matches(item.training):
                            return item.training

    async def until_state(
        self, name: str, state: "training_pb2.Training.State.ValueType"
    ) -> training_pb2.Training:
        return await self.until(name, lambda training: training.state == state)

    async def until_epochs(self, name: str, number: int) -> None:
        """Waits until an epoch was accepted."""
        async with asyncio.timeout(20), contextlib.aclosing(self.watch(name)) as stream:
            async for item in stream:
                if item.HasField("epoch") and item.epoch.epoch >= number:
                    return
                if item.HasField("training") and item.training.num_epochs_done >= number:
                    return

    async def running(self, **training: Any) -> tuple[training_pb2.Training, Puppet]:
        """Starts a training and brings it to RUNNING."""
        started = await self.start(**training)
        puppet = await self.puppet()
        await puppet.started()
        return await self.until_state(started.name, State.RUNNING), puppet

    async def evaluate(
        self,
        name: str,
        split: "common_pb2.Split.ValueType",
        *,
        attempt: int = 1,
        state: "metrics_pb2.Evaluation.State.ValueType" = metrics_pb2.Evaluation.SUCCEEDED,
    ) -> None:
        """Publishes an evaluation as the metrics service does."""
        what = "val" if split == common_pb2.SPLIT_VAL else "test"
        evaluation = metrics_pb2.Evaluation(
            name=f"{name}/evaluations/{what}", state=state, split=split, attempt=attempt
        )
        if state == metrics_pb2.Evaluation.FAILED:
            evaluation.failure.status.code = 15
            evaluation.failure.status.message = "predictions are gone"
        subject = f"detflow.v1.evaluation.{name.rsplit('/', 1)[1]}.completed"
        await self.publish(subject, next(self.numbers), events_pb2.Event(evaluation=evaluation))

    async def evaluate_both(self, name: str, *, attempt: int = 1) -> None:
        """Measures an attempt, once its predictions are announced."""
        async with asyncio.timeout(20):
            await self.predictions[name.rsplit("/", 1)[1], attempt].wait()
        await self.evaluate(name, common_pb2.SPLIT_VAL, attempt=attempt)
        await self.evaluate(name, common_pb2.SPLIT_TEST, attempt=attempt)

    async def version_event(self, what: str, seq: int, version: str = VERSION) -> None:
        """Publishes that a version was deleted or undeleted."""
        subject = f"detflow.v1.version.{version.rsplit('/', 1)[1]}.{what}"
        event = events_pb2.Event(version=version_pb2.Version(name=version))
        await self.publish(subject, seq, event)

    async def publish(self, subject: str, seq: int, event: events_pb2.Event) -> None:
        headers = {
            Header.EVENT_ID: f"event-{next(self.numbers)}",
            Header.SEQ: str(seq),
            "ce-time": datetime.now(UTC).isoformat(),
        }
        await self.bus.publish_durable(subject, event.SerializeToString(), headers)

    async def events(self, training_id: str) -> list[events_pb2.Event]:
        """Everything the training's history says, in order."""
        async with self.db.connection() as conn:
            rows = await conn.fetch(
                "select payload from outbox where resource = $1 order by seq",
                f"training.{training_id}",
            )
        return [events_pb2.Event.FromString(row["payload"]) for row in rows]

    async def history(self, training_id: str) -> list[str]:
        """The states a training went through."""
        return [
            State.Name(event.training.state)
            for event in await self.events(training_id)
            if event.HasField("training")
        ]

    @contextlib.asynccontextmanager
    async def replica(
        self, deadlines: Deadlines = FAST
    ) -> "AsyncIterator[trainer_pb2_grpc.TrainerServiceAsyncStub]":
        """Runs one more trainer on the same database."""
        async with trainer(self.settings, deadlines) as address, channels.channel(address) as c:
            yield trainer_pb2_grpc.TrainerServiceStub(c)

    @contextlib.asynccontextmanager
    async def replica_weights(self) -> "AsyncIterator[weights_pb2_grpc.WeightsServiceAsyncStub]":
        """Runs one more trainer on the same database, for its uploads."""
        async with trainer(self.settings) as address, channels.channel(address) as channel:
            yield weights_pb2_grpc.WeightsServiceStub(channel)


async def eventually(holds: Callable[[], Awaitable[bool]], seconds: float = 15.0) -> None:
    """Waits for what announces itself to nobody: the end of a stranger's process, a file, a row."""
    async with asyncio.timeout(seconds):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.05)


def executor(settings: Settings) -> LocalExecutor:
    """Starts puppets instead of workers."""
    paths = f"{Path(__file__).parent}:{Path(__file__).parent.parent}"
    return LocalExecutor(
        settings, command=PUPPET, environ={**os.environ, "PYTHONPATH": paths, "SECRET": "x"}
    )


@contextlib.asynccontextmanager
async def trainer(
    settings: Settings,
    deadlines: Deadlines = FAST,
    make_executor: Callable[[Settings], Executor] | None = executor,
    run: trials.RunJob = run_job,
    run_queued: queued_preflights.RunJob = run_job,
) -> AsyncIterator[str]:
    """Runs a trainer service in this process, by default with puppets; yields its address."""
    service = Service("trainer", migrations=MIGRATIONS, settings=settings)
    chosen = make_executor(settings) if make_executor else None
    process = asyncio.create_task(serve(service, chosen, deadlines, run, run_queued))
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
    *,
    bus: Bus,
    nats_url: str,
    database_url: str,
    folder: Path,
    deadlines: Deadlines = FAST,
    num_slots: int = 1,
    num_gpu_slots: int = 0,
    make_executor: Callable[[Settings], Executor] | None = executor,
    run: trials.RunJob = run_job,
    run_queued: queued_preflights.RunJob = run_job,
    **more_settings: Any,
) -> AsyncIterator[Rig]:
    """Runs a trainer and what it depends on."""
    versions = Versions()
    server = grpc.aio.server(interceptors=[Boundary()])
    handlers = {
        "GetVersion": grpc.unary_unary_rpc_method_handler(
            versions.GetVersion,
            version_pb2.GetVersionRequest.FromString,
            version_pb2.Version.SerializeToString,
        )
    }
    projects = {
        "GetProject": grpc.unary_unary_rpc_method_handler(
            versions.GetProject,
            project_pb2.GetProjectRequest.FromString,
            project_pb2.Project.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler("detflow.v1.VersionService", handlers),
            grpc.method_handlers_generic_handler("detflow.v1.ProjectService", projects),
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    settings = Settings(
        database_url=database_url,
        nats_url=nats_url,
        store_url=f"file://{folder}/store",
        version_address=f"127.0.0.1:{port}",
        data_dir=folder / "data",
        num_cpu_slots=num_slots,
        num_gpu_slots=num_gpu_slots,
        num_queued_preflights=0,  # puppets train on bundles that there are not
        drain_seconds=2,
        access="open",
    )
    settings = dataclasses.replace(settings, **more_settings)
    hellos: asyncio.Queue[Puppet] = asyncio.Queue()

    async def on_hello(msg: Any) -> None:
        hellos.put_nowait(Puppet(bus, json.loads(msg.data)))

    predictions: dict[tuple[str, int], asyncio.Event] = defaultdict(asyncio.Event)

    async def on_predictions(msg: Any) -> None:
        attempt = events_pb2.Event.FromString(msg.data).predictions.attempt
        predictions[msg.subject.split(".")[3], attempt].set()

    subscriptions = [
        await bus.subscribe("test.puppet.hello", on_hello),
        await bus.subscribe("detflow.v1.training.*.predictions_written", on_predictions),
    ]
    db = await Database.connect(database_url, "trainer", max_size=3)
    try:
        async with (
            trainer(settings, deadlines, make_executor, run, run_queued) as address,
            channels.channel(address) as channel,
        ):
            yield Rig(
                bus=bus,
                db=db,
                versions=versions,
                settings=settings,
                stub=trainer_pb2_grpc.TrainerServiceStub(channel),
                weights=weights_pb2_grpc.WeightsServiceStub(channel),
                hellos=hellos,
                predictions=predictions,
            )
    finally:
        for subscription in subscriptions:
            await subscription.unsubscribe()
        await db.close()
        await server.stop(None)


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    """A fresh trainer service."""
    async with running(
        bus=bus,
        nats_url=nats_url,
        database_url=await make_database_url("trainer"),
        folder=tmp_path,
    ) as one:
        yield one


async def main() -> None:
    """Runs a trainer with puppets as a process of its own, to be killed."""
    settings = dataclasses.replace(Settings.load(), num_queued_preflights=0)
    service = Service("trainer", migrations=MIGRATIONS, settings=settings)
    await serve(service, executor(settings), FAST)


if __name__ == "__main__":
    asyncio.run(main())
