"""A running preprocess service, real but for the version service, which the test plays."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from detflow import channels
from detflow.errors import not_found
from detflow.events import Bus, Header
from detflow.interceptors import Boundary
from detflow.projects import Projects
from detflow.server import Service
from detflow.settings import Settings
from detflow.v1 import (
    common_pb2,
    dataset_pb2,
    dataset_pb2_grpc,
    events_pb2,
    preprocess_pb2,
    preprocess_pb2_grpc,
    project_pb2,
    project_pb2_grpc,
    version_pb2,
)
from services.preprocess.__main__ import MIGRATIONS, serve
from services.preprocess.archive import Limits

PROJECT = "projects/p"

DatasetState = dataset_pb2.Dataset.State
PreprocessingState = preprocess_pb2.Preprocessing.State


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Clients of the service under test, and what the tests do with them."""

    datasets: "dataset_pb2_grpc.DatasetServiceAsyncStub"
    preprocessings: "preprocess_pb2_grpc.PreprocessServiceAsyncStub"
    bus: Bus

    async def upload(self, data: bytes, project: str = PROJECT) -> dataset_pb2.Upload:
        """Uploads an archive."""
        chunks = [data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20)]
        with channels.translate():
            upload: dataset_pb2.Upload = await self.datasets.UploadArchive(
                iter(
                    [
                        dataset_pb2.UploadArchiveRequest(parent=project),
                        *(dataset_pb2.UploadArchiveRequest(chunk=chunk) for chunk in chunks),
                        dataset_pb2.UploadArchiveRequest(size_bytes=len(data)),
                    ]
                )
            )
        return upload

    async def create(
        self,
        upload: str,
        name: str = "cells",
        *,
        source_url: str = "",
        skip_invalid: bool = False,
        request_id: str = "",
        project: str = PROJECT,
    ) -> dataset_pb2.Dataset:
        """Starts an import."""
        with channels.translate():
            dataset: dataset_pb2.Dataset = await self.datasets.CreateDataset(
                dataset_pb2.CreateDatasetRequest(
                    parent=project,
                    dataset=dataset_pb2.Dataset(display_name=name),
                    upload=upload,
                    source_url=source_url,
                    skip_invalid=skip_invalid,
                    request_id=request_id,
                )
            )
        return dataset

    async def watch_dataset(
        self, name: str, cursor: str = ""
    ) -> list[dataset_pb2.WatchDatasetResponse]:
        """Watches an import to its end."""
        request = dataset_pb2.WatchDatasetRequest(name=name, cursor=cursor)
        with channels.translate():
            return [r async for r in self.datasets.WatchDataset(request)]

    async def import_archive(
        self, data: bytes, name: str = "cells", *, skip_invalid: bool = False
    ) -> dataset_pb2.Dataset:
        """Uploads and imports an archive; returns the dataset in its final state."""
        upload = await self.upload(data)
        dataset = await self.create(upload.name, name, skip_invalid=skip_invalid)
        return (await self.watch_dataset(dataset.name))[-1].dataset

    async def tell(self, what: str, version: version_pb2.Version, event_id: str = "") -> None:
        """Publishes an event as the version service does."""
        version_id = version.name.rsplit("/", 1)[1]
        await self.bus.publish_durable(
            f"detflow.v1.version.{version_id}.{what}",
            events_pb2.Event(version=version).SerializeToString(),
            {
                Header.EVENT_ID: event_id or str(uuid.uuid4()),
                Header.SEQ: str(version.revision),
                Header.NAME: version.name,
            },
        )

    async def watch_preprocessing(
        self, version: str, cursor: str = ""
    ) -> list[preprocess_pb2.WatchPreprocessingResponse]:
        """Watches a preprocessing to its end."""
        request = preprocess_pb2.WatchPreprocessingRequest(version=version, cursor=cursor)
        with channels.translate():
            return [r async for r in self.preprocessings.WatchPreprocessing(request)]

    async def preprocess(
        self, dataset: str, recipe: version_pb2.Recipe, version_id: str = "v1"
    ) -> preprocess_pb2.Preprocessing:
        """Creates a version and waits for its bundle."""
        await self.tell("created", version_of(dataset, recipe, version_id))
        responses = await self.watch_preprocessing(f"{PROJECT}/versions/{version_id}")
        return responses[-1].preprocessing


@dataclass(frozen=True, kw_only=True)
class Rig(Caller):
    """The same, with the service in this process."""

    service: Service


def version_of(
    dataset: str, recipe: version_pb2.Recipe | None = None, version_id: str = "v1"
) -> version_pb2.Version:
    """A version as the version service creates it."""
    return version_pb2.Version(
        name=f"{PROJECT}/versions/{version_id}", dataset=dataset, recipe=recipe, revision=1
    )


def reasons(failure: common_pb2.Failure) -> list[tuple[str, str]]:
    """Field and reason of every violation of a failure."""
    from detflow.errors import from_status

    return [(v.field, v.reason) for v in from_status(failure.status).violations]


class KnownProjects(project_pb2_grpc.ProjectServiceServicer):
    """The version service's part: there are two projects."""

    async def GetProject(self, request: project_pb2.GetProjectRequest, context: Any) -> Any:
        if request.name not in (PROJECT, "projects/q"):
            raise not_found(request.name)
        return project_pb2.Project(name=request.name)


@contextlib.asynccontextmanager
async def version_service() -> AsyncIterator[str]:
    """Plays the version service on a free port; yields its address."""
    server = aio.server(interceptors=[Boundary()])
    servicer: Any = KnownProjects  # the generated base is abstract in its methods
    project_pb2_grpc.add_ProjectServiceServicer_to_server(servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@contextlib.asynccontextmanager
async def running(
    database_url: str,
    nats_url: str,
    bus: Bus,
    folder: Path,
    *,
    limits: Limits | None = None,
    max_upload_bytes: int = 1 << 30,
    import_urls: str = "",
    **others: Any,
) -> AsyncIterator[Rig]:
    """Runs the service on a free port; at the end it drains."""
    settings = Settings(
        database_url=database_url,
        nats_url=nats_url,
        store_url=f"file://{folder}/store",
        data_dir=folder / "data",
        preprocess_processes=1,
        max_upload_bytes=max_upload_bytes,
        import_urls=import_urls,
        drain_seconds=1.0,
        log_level="error",
        access="open",
        **others,
    )
    async with (
        version_service() as version_address,
        channels.channel(version_address) as version,
        Service("preprocess", migrations=MIGRATIONS, settings=settings) as service,
    ):
        projects = Projects(project_pb2_grpc.ProjectServiceStub(version))
        serving = asyncio.create_task(serve(service, limits or Limits(), projects))
        started = asyncio.create_task(service.serving.wait())
        await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        async with channels.channel(service.address) as channel:
            yield Rig(
                service=service,
                datasets=dataset_pb2_grpc.DatasetServiceStub(channel),
                preprocessings=preprocess_pb2_grpc.PreprocessServiceStub(channel),
                bus=bus,
            )
        service.stop()
        await serving


@pytest.fixture
async def rig(
    make_database_url: Callable[[str], Awaitable[str]], nats_url: str, bus: Bus, tmp_path: Path
) -> AsyncIterator[Rig]:
    """A fresh preprocess service."""
    async with running(await make_database_url("preprocess"), nats_url, bus, tmp_path) as rig:
        yield rig


def states(responses: Iterable[preprocess_pb2.WatchPreprocessingResponse]) -> list[str]:
    """Names of the states in a watch, in order."""
    return [
        PreprocessingState.Name(r.preprocessing.state)
        for r in responses
        if r.HasField("preprocessing")
    ]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for something that no event tells of, such as a file that disappears."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
