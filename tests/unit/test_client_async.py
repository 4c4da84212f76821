"""The client for asyncio, against a gRPC server in this process."""

import asyncio
import contextlib
import inspect
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

import detflow
from detflow import errors
from detflow.client.threads import methods_of
from detflow.v1 import common_pb2, export_pb2, export_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from detflow.v1 import training_pb2 as training

ROOT = Path(__file__).parents[2]


@dataclass
class Calls:
    """What a server sees of its callers."""

    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    cursors: list[str] = field(default_factory=list)

    def hang(self, context: Any) -> None:
        """Stays until the caller has gone away."""
        context.add_callback(self.ended.set)
        self.begun.set()
        assert self.ended.wait(60)

    async def hanging(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 60)


@dataclass
class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    calls: Calls

    def GetTraining(self, request: Any, context: Any) -> Any:
        if request.name == "missing":
            status = errors.to_status(errors.NotFound("there is no such training"))
            context.abort_with_status(rpc_status.to_status(status))
        if request.name == "slow":
            self.calls.hang(context)
        return training.Training(name=request.name)

    def ListModels(self, request: Any, context: Any) -> Any:
        return trainer_pb2.ListModelsResponse(models=[trainer_pb2.Model(name="models/yolov8n")])

    def WatchTraining(self, request: Any, context: Any) -> Iterator[Any]:
        self.calls.cursors.append(request.cursor)
        number = int(request.cursor or 0) + 1
        yield trainer_pb2.WatchTrainingResponse(cursor=f"{number}")
        if number < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        self.calls.hang(context)


class Exports(export_pb2_grpc.ExportServiceServicer):
    def GetExport(self, request: Any, context: Any) -> Any:
        return export_pb2.Export(name=request.name, state=export_pb2.Export.SUCCEEDED)

    def WatchExport(self, request: Any, context: Any) -> Iterator[Any]:
        for percent in (0.0, 50.0):
            progress = common_pb2.Progress(stage="export", percent=percent)
            yield export_pb2.WatchExportResponse(progress=progress)
        yield export_pb2.WatchExportResponse(export=self.GetExport(request, context))


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
async def client(calls: Calls) -> AsyncIterator[detflow.AsyncClient]:
    server = grpc.server(ThreadPoolExecutor(4))
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(Trainer(calls), server)  # type: ignore[abstract]
    export_pb2_grpc.add_ExportServiceServicer_to_server(Exports(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    environ = {"DETFLOW_TRAINER_ADDRESS": f"127.0.0.1:{port}"}
    async with detflow.AsyncClient("127.0.0.1:1", timeout=60, environ=environ) as client:
        yield client
    server.stop(None).wait()


async def test_calls_are_awaited_and_raise_what_the_sync_ones_raise(
    client: detflow.AsyncClient,
) -> None:
    names = [f"t{number}" for number in range(20)]
    found = await asyncio.gather(*(client.trainings.get(name) for name in names))
    assert [one.name for one in found] == names
    assert [one.name for one in await client.models()] == ["models/yolov8n"]
    with pytest.raises(errors.NotFound, match="no such training"):
        await client.trainings.get("missing")


async def test_cancelled_call_has_ended_when_its_coroutine_has(
    client: detflow.AsyncClient, calls: Calls
) -> None:
    task = asyncio.create_task(client.trainings.get("slow"))
    await calls.hanging()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(calls.ended.wait, 10)
    assert (await client.trainings.get("next")).name == "next"


async def test_timeout_ends_the_call(client: detflow.AsyncClient, calls: Calls) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.trainings.get("slow")
    assert await asyncio.to_thread(calls.ended.wait, 10)


async def test_watch_goes_on_at_its_cursor_and_ends_its_call_when_closed(
    client: detflow.AsyncClient, calls: Calls
) -> None:
    cursors = []
    async with contextlib.aclosing(client.trainings.watch("t")) as watch:
        async for message in watch:
            cursors.append(message.cursor)
            if len(cursors) == 3:
                break
        await calls.hanging()
        assert not calls.ended.is_set()
    assert await asyncio.to_thread(calls.ended.wait, 10)
    assert (cursors, calls.cursors) == (["1", "2", "3"], ["", "1", "2"])


async def test_watch_that_is_waited_on_is_cancelled_with_its_task(
    client: detflow.AsyncClient, calls: Calls
) -> None:
    async def read() -> None:
        async for _ in client.trainings.watch("t", cursor="2"):
            pass

    task = asyncio.create_task(read())
    await calls.hanging()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(calls.ended.wait, 10)


async def test_progress_is_told_in_the_event_loop(client: detflow.AsyncClient) -> None:
    told: list[tuple[float, asyncio.AbstractEventLoop]] = []

    def progress(message: common_pb2.Progress) -> None:
        told.append((message.percent, asyncio.get_running_loop()))

    await client.exports.wait("e", progress=progress)
    loop = asyncio.get_running_loop()
    assert told == [(0.0, loop), (50.0, loop)]


async def test_nouns_and_methods_are_those_of_the_client(client: detflow.AsyncClient) -> None:
    with detflow.Client("127.0.0.1:1", environ={}) as blocking:
        for name, noun in blocking.nouns().items():
            there = getattr(client, name)
            assert {*methods_of(type(noun))} <= {*vars(there)}, name
    # Two ways to say that something comes bit by bit, and nothing comes before it is asked for.
    for stream in (client.results.list("t"), client.reports.iter_table("t", "classes")):
        assert inspect.isasyncgen(stream)


def test_declared_types_fit_the_client() -> None:
    done = subprocess.run(
        [sys.executable, "tools/async_stub.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
