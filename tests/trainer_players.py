"""Those a trainer deals with, played by the test: the version service and the workers."""

import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from detflow.errors import ResourceExhausted, failure, not_found
from detflow.events import Bus
from detflow.v1 import common_pb2, project_pb2, version_pb2
from services.trainer.domain import Plan
from tests import trainer_puppet

PROJECT = "projects/p"
VERSION = f"{PROJECT}/versions/v1"
MANIFEST = common_pb2.StoredObject(key="bundles/manifests/a.json", size_bytes=2, sha256="ab" * 32)


def plan(version: str, *, epochs: int = 1) -> Plan:
    """Returns what a small training is to do."""
    return Plan(
        project="p",
        version=version,
        model="yolov8n",
        batch_size=1,
        epochs=epochs,
        hyperparameters={},
        manifest=MANIFEST,
    )


class Versions:
    """Plays the version service."""

    def __init__(self) -> None:
        self.by_name: dict[str, version_pb2.Version] = {}
        self.quota = project_pb2.Quota()
        self.before_answer: Callable[[], Awaitable[None]] | None = None
        self.put(VERSION)

    def put(
        self,
        name: str,
        state: "version_pb2.Version.State.ValueType" = version_pb2.Version.READY,
    ) -> None:
        version = version_pb2.Version(name=name, state=state)
        if state not in (version_pb2.Version.PREPROCESSING, version_pb2.Version.FAILED):
            version.manifest.CopyFrom(MANIFEST)
        self.by_name[name] = version

    async def GetVersion(
        self, request: version_pb2.GetVersionRequest, context: Any
    ) -> version_pb2.Version:
        if request.name not in self.by_name:
            raise not_found(request.name)
        version = version_pb2.Version()
        version.CopyFrom(self.by_name[request.name])
        if self.before_answer is not None:
            await self.before_answer()
        return version

    async def GetProject(
        self, request: project_pb2.GetProjectRequest, context: Any
    ) -> project_pb2.Project:
        if not any(name.startswith(f"{request.name}/") for name in self.by_name):
            raise not_found(request.name)
        return project_pb2.Project(name=request.name, quota=self.quota)


@dataclass
class Puppet:
    """A worker that said hello."""

    bus: Bus
    hello: dict[str, Any]

    @property
    def attempt(self) -> int:
        return int(self.hello["attempt"])

    @property
    def pid(self) -> int:
        return int(self.hello["pid"])

    @property
    def training(self) -> str:
        return str(self.hello["training"])

    @property
    def folder(self) -> Path:
        return Path(self.hello["folder"])

    async def tell(self, **order: Any) -> dict[str, Any]:
        subject = f"test.puppet.{self.training.rsplit('/', 1)[1]}.{self.attempt}"
        answer = await self.bus.request(subject, json.dumps(order).encode(), 10)
        return dict(json.loads(answer))

    async def started(self) -> None:
        await self.tell(record={"started": {"firstEpoch": 1, "device": "cpu"}})

    async def epoch(self, number: int, *, checkpoint: bool = True, **values: float) -> None:
        metrics = {"attempt": self.attempt, "epoch": number, "values": values or {"lr": 0.1}}
        record: dict[str, Any] = {"metrics": metrics}
        if checkpoint:
            key = f"trainings/{self.training}/{self.attempt}/checkpoint-{number:06d}.pt"
            record["checkpoint"] = {"epoch": number, "object": trainer_puppet.stored(key)}
        await self.tell(record={"epoch": record})

    async def step(self, epochs_done: int, step: int) -> None:
        """Stores a checkpoint inside an epoch."""
        key = f"trainings/{self.training}/{self.attempt}/step-{epochs_done:06d}-{step:06d}.pt"
        stored = trainer_puppet.stored(key)
        checkpoint = {"epoch": epochs_done, "step": step, "object": stored}
        await self.tell(record={"epoch": {"checkpoint": checkpoint}})

    async def preflight(self, **fields: Any) -> None:
        await self.tell(record={"preflight": fields})

    async def log(self, *lines: str) -> None:
        await self.tell(record={"log": {"attempt": self.attempt, "lines": lines}})

    async def evaluating(self) -> None:
        await self.tell(record={"evaluating": {"weights": trainer_puppet.stored("best.pt")}})

    async def finished(self) -> None:
        predictions = {
            "attempt": self.attempt,
            "val": trainer_puppet.stored("predictions-val.parquet"),
            "test": trainer_puppet.stored("predictions-test.parquet"),
        }
        await self.tell(record={"finished": {"predictions": predictions}})

    async def failed(self, code: int, message: str) -> None:
        status = {"code": code, "message": message}
        await self.tell(record={"failed": {"failure": {"status": status}}})

    async def out_of_memory(self) -> None:
        error = ResourceExhausted("out of memory; lower batch_size", reason="OUT_OF_MEMORY")
        status = json_format.MessageToDict(failure(error))
        await self.tell(record={"failed": {"failure": status}})

    async def finish(self) -> None:
        """Does all that is left of a training, and exits."""
        await self.evaluating()
        await self.finished()
        await self.tell(exit=0)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
