"""Users who work while everything is killed; what they were promised is checked afterwards."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import httpx

from detflow import channels
from detflow.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from detflow.v1 import dataset_pb2, export_pb2, trainer_pb2, training_pb2, version_pb2
from tests.chaos.system import System
from tests.deployment_rig import PROJECT

T = TypeVar("T")
State = training_pb2.Training.State
V = version_pb2.Version
AT_REST = {State.SUCCEEDED, State.FAILED, State.STOPPED, State.PAUSED}
EPOCHS = 10
_PATIENCE_SECONDS = 120.0  # once nothing is killed any more
_POLL_SECONDS = 0.1
_TRANSIENT = (Unavailable, DeadlineExceeded)


@dataclass
class Promised:
    """What was acknowledged.

    Attributes:
        versions: Display name by name.
        deleted: Versions in the trash.
        trainings: Last known message of each.
        exports: Those that were made.
        uploads: SHA-256 by name.
        revisions: What each watcher was told: revisions of each version, in order.
    """

    versions: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    trainings: dict[str, training_pb2.Training] = field(default_factory=dict)
    exports: list[export_pb2.Export] = field(default_factory=list)
    uploads: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, dict[str, list[int]]] = field(default_factory=dict)


class Users:
    """Does what users do, again and again; an answer that is not allowed ends the test.

    Args:
        system: The system.
        chance: Decides what is done.
        dataset: What versions are made of.

    Attributes:
        promised: What they know.
        go: Cleared to let them finish what they are at, and begin nothing more.
    """

    def __init__(self, system: System, chance: random.Random, dataset: str) -> None:
        self.promised = Promised()
        self.go = asyncio.Event()
        self._system = system
        self._chance = chance
        self._dataset = dataset
        self._numbers = itertools.count(1)
        self._busy = 0
        self._waits: dict[int, object] = {}
        self._idle = asyncio.Event()

    def done(self) -> Counter[str]:
        """Counts what was done."""
        states = Counter(State.Name(one.state) for one in self.promised.trainings.values())
        return Counter(
            {
                "versions made": len(self.promised.versions),
                "files uploaded": len(self.promised.uploads),
                "models exported": len(self.promised.exports),
                **{f"trainings {name}": number for name, number in states.items()},
            }
        )

    async def rest(self) -> None:
        """Waits until everybody has finished what they were at."""
        self.go.clear()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while self._busy:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError as error:
            waits = list(self._waits.values())
            raise AssertionError(f"still, after {_PATIENCE_SECONDS:.0f} s: {waits}") from error

    async def repeat(self, job: Callable[[int], Awaitable[None]]) -> None:
        """Does a job again and again."""
        while True:
            await self.go.wait()
            self._busy += 1
            try:
                await job(next(self._numbers))
            finally:
                self._busy -= 1
                self._idle.set()

    async def train(self, number: int) -> None:
        """Makes a version, trains it and does with the training what comes to mind."""
        plan = self._chance.choice(["see", "see", "pause", "finish", "discard", "delete"])
        if plan == "see":
            await self.see(number)
            return
        version = await self._make_version(f"version {number}")
        training = await self._start(version.name, number)
        match plan:
            case "pause":
                await self._stop(training.name, training_pb2.STOP_MODE_PAUSE)
                await self._see_through(await self._until_rest(training.name))
            case "finish" | "discard":
                mode = training_pb2.StopMode.Value(f"STOP_MODE_{plan.upper()}")
                await self._stop(training.name, mode)
                await self._until_rest(training.name)
            case "delete":
                await self._delete(version.name)
                await self._until_rest(training.name)

    async def see(self, number: int) -> None:
        """Makes a version, trains it to the end and exports the model."""
        version = await self._make_version(f"version {number}")
        training = await self._see_through(await self._start(version.name, number))
        if training.state == State.SUCCEEDED:
            await self._export(training.name, number)

    async def upload(self, number: int) -> None:
        """Uploads a file in two streams, wherever it has to go on."""
        content = random.Random(number).randbytes(60_000)
        sha256 = hashlib.sha256(content).hexdigest()
        stubs = self._system.datasets
        upload = await self.call(
            lambda: stubs.CreateUpload(
                dataset_pb2.CreateUploadRequest(
                    parent=PROJECT,
                    size_bytes=len(content),
                    sha256=sha256,
                    request_id=f"upload {number}",
                )
            )
        )
        name = upload.name
        while upload.state != dataset_pb2.Upload.RECEIVED:
            begin = upload.committed_bytes
            part = content[begin : begin + 40_000]
            try:
                with channels.translate():
                    await stubs.WriteUpload(_chunks(name, begin, part), timeout=5.0)
            except (*_TRANSIENT, Aborted):
                await asyncio.sleep(_POLL_SECONDS)
            except (FailedPrecondition, ResourceExhausted) as error:
                assert error.reason in ("WRONG_OFFSET", "DISK_FULL"), error
            upload = await self.call(
                lambda: stubs.GetUpload(dataset_pb2.GetUploadRequest(name=name))
            )
        self.promised.uploads[name] = sha256
        await asyncio.sleep(self._chance.uniform(0.0, 1.0))

    async def ask(self, number: int) -> None:
        """Reads through the gateway: what is away is 503 or 504, and never 500."""
        url = f"http://127.0.0.1:{self._system.port}/v1/{PROJECT}/versions?pageSize=3"
        async with httpx.AsyncClient(timeout=10.0) as http:
            with contextlib.suppress(httpx.TransportError):
                answer = await http.get(url)
                assert answer.status_code in (200, 503, 504), answer.text
        await asyncio.sleep(_POLL_SECONDS)

    async def watch(self) -> None:
        """Watches all versions, through everything, with the cursor."""
        seen = self.promised.revisions.setdefault("gRPC", {})
        request = version_pb2.WatchVersionsRequest(parent=PROJECT)
        while True:
            try:
                with channels.translate():
                    async for message in self._system.versions.WatchVersions(request):
                        request.cursor = message.cursor
                        for version in [*message.snapshot.versions, message.version]:
                            if version.name:
                                seen.setdefault(version.name, []).append(version.revision)
            except _TRANSIENT:
                await asyncio.sleep(_POLL_SECONDS)

    async def watch_by_http(self) -> None:
        """Watches all versions by server-sent events, with Last-Event-ID."""
        seen = self.promised.revisions.setdefault("SSE", {})
        url = f"http://127.0.0.1:{self._system.port}/v1/{PROJECT}/versions:watch"
        headers = {"Accept": "text/event-stream"}
        while True:
            try:
                async with (
                    httpx.AsyncClient(timeout=30.0) as http,
                    http.stream("GET", url, headers=headers) as answer,
                ):
                    assert answer.status_code in (200, 503, 504), await answer.aread()
                    if answer.status_code == 200:
                        await self._hear(answer, headers, seen)
            except httpx.TransportError:
                pass
            await asyncio.sleep(_POLL_SECONDS)

    @staticmethod
    async def _hear(
        answer: httpx.Response, headers: dict[str, str], seen: dict[str, list[int]]
    ) -> None:
        cursor, data = "", ""
        async for line in answer.aiter_lines():
            if line.startswith("id:"):
                cursor = line[3:].strip()
            elif line.startswith("data:"):
                data += line[5:]
            elif not line:
                message = json.loads(data) if data.strip().startswith("{") else {}
                told = [*message.get("snapshot", {}).get("versions", []), message.get("version")]
                for version in filter(None, told):
                    seen.setdefault(version["name"], []).append(int(version["revision"]))
                if cursor:
                    headers["Last-Event-ID"] = cursor
                cursor = data = ""

    async def call(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call while something is away; anything else is a finding."""
        while True:
            try:
                with channels.translate():
                    return await ask()
            except _TRANSIENT:
                await asyncio.sleep(_POLL_SECONDS)

    async def _make_version(self, display_name: str) -> version_pb2.Version:
        request = version_pb2.CreateVersionRequest(
            parent=PROJECT,
            version=V(display_name=display_name, dataset=self._dataset),
            request_id=display_name,
        )
        version = await self.call(lambda: self._system.versions.CreateVersion(request))
        self.promised.versions[version.name] = display_name
        again = await self.call(lambda: self._system.versions.CreateVersion(request))
        assert again.name == version.name  # as if the reply had been lost
        made: version_pb2.Version = await self._until(
            lambda: self._system.versions.GetVersion(
                version_pb2.GetVersionRequest(name=version.name)
            ),
            lambda found: found.state != V.PREPROCESSING,
        )
        assert made.state != V.FAILED, made
        return made

    async def _start(self, version: str, number: int) -> training_pb2.Training:
        training = training_pb2.Training(model="yolov8n", batch_size=4, epochs=EPOCHS)
        request = trainer_pb2.StartTrainingRequest(
            parent=version, training=training, request_id=f"training {number}"
        )
        started: training_pb2.Training = await self.call(
            lambda: self._system.trainer.StartTraining(request)
        )
        self.promised.trainings[started.name] = started
        return started

    async def _see_through(self, training: training_pb2.Training) -> training_pb2.Training:
        """Waits for the end; goes on with what has crashed too often or was paused."""
        for _ in range(10):
            training = await self._until_rest(training.name)
            if training.state not in (State.FAILED, State.PAUSED):
                break
            request = trainer_pb2.ResumeTrainingRequest(name=training.name)
            with contextlib.suppress(FailedPrecondition):  # it was done, and the reply lost
                await self.call(partial(self._system.trainer.ResumeTraining, request))
        return training

    async def _stop(self, name: str, mode: "training_pb2.StopMode.ValueType") -> None:
        await asyncio.sleep(self._chance.uniform(0.0, 2.0))  # at another moment each time
        request = trainer_pb2.StopTrainingRequest(name=name, mode=mode)
        try:
            await self.call(lambda: self._system.trainer.StopTraining(request))
        except FailedPrecondition as error:  # it had ended
            assert error.reason == "TRAINING_NOT_LIVE", error

    async def _delete(self, version: str) -> None:
        await asyncio.sleep(self._chance.uniform(0.0, 2.0))
        with contextlib.suppress(NotFound, FailedPrecondition):  # done, and the reply lost
            await self.call(
                lambda: self._system.versions.DeleteVersion(
                    version_pb2.DeleteVersionRequest(name=version)
                )
            )
        self.promised.deleted.add(version)

    async def _export(self, training: str, number: int) -> None:
        request = export_pb2.CreateExportRequest(
            parent=training,
            export=export_pb2.Export(format=export_pb2.Export.ONNX),
            request_id=f"export {number}",
        )
        export = await self.call(lambda: self._system.exports.CreateExport(request))
        E = export_pb2.Export
        export = await self._until(
            lambda: self._system.exports.GetExport(export_pb2.GetExportRequest(name=export.name)),
            lambda found: found.state not in (E.QUEUED, E.RUNNING),
        )
        if export.state == E.SUCCEEDED:
            self.promised.exports.append(export)

    async def _until_rest(self, name: str) -> training_pb2.Training:
        training: training_pb2.Training = await self._until(
            lambda: self._system.trainer.GetTraining(trainer_pb2.GetTrainingRequest(name=name)),
            lambda found: found.state in AT_REST,
        )
        self.promised.trainings[name] = training
        return training

    async def _until(self, ask: Callable[[], Awaitable[T]], done: Callable[[T], bool]) -> T:
        me = next(self._numbers)
        try:
            while not done(found := await self.call(ask)):
                self._waits[me] = found
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            self._waits.pop(me, None)
        return found


async def _chunks(
    name: str, offset: int, content: bytes
) -> AsyncIterator[dataset_pb2.WriteUploadRequest]:
    start = dataset_pb2.WriteUploadRequest.Start(name=name, offset=offset)
    yield dataset_pb2.WriteUploadRequest(start=start)
    yield dataset_pb2.WriteUploadRequest(chunk=content)
