"""The version service with its guard, for the tests of access."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc.aio

from detflow.server import Service
from detflow.settings import Settings
from detflow.v1 import access_pb2, access_pb2_grpc, project_pb2_grpc, version_pb2_grpc
from services.version.__main__ import MIGRATIONS, serve

OWNER = "owner-" + "o" * 32
SERVICE = "service-" + "s" * 32


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata that shows a token."""
    return (("authorization", f"Bearer {token}"),)


@dataclasses.dataclass(frozen=True)
class Rig:
    """A version service that asks who calls."""

    service: Service
    channel: grpc.aio.Channel

    @property
    def access(self) -> access_pb2_grpc.AccessServiceAsyncStub:
        return access_pb2_grpc.AccessServiceStub(self.channel)

    @property
    def projects(self) -> project_pb2_grpc.ProjectServiceAsyncStub:
        return project_pb2_grpc.ProjectServiceStub(self.channel)

    @property
    def versions(self) -> version_pb2_grpc.VersionServiceAsyncStub:
        return version_pb2_grpc.VersionServiceStub(self.channel)

    async def create_key(
        self, parent: str, role: access_pb2.Role.ValueType, **more: object
    ) -> access_pb2.ApiKey:
        """Creates an API key as the owner."""
        return await self.access.CreateApiKey(
            access_pb2.CreateApiKeyRequest(
                parent=parent,
                api_key=access_pb2.ApiKey(display_name="test", role=role, **more),  # type: ignore[arg-type]
            ),
            metadata=bearer(OWNER),
        )


def settings(database_url: str, nats_url: str, folder: Path, **more: object) -> Settings:
    """Returns the settings of a version service that asks who calls."""
    made = Settings(
        database_url=database_url,
        nats_url=nats_url,
        store_url=f"file://{folder}/store",
        data_dir=folder / "data",
        drain_seconds=2,
        service_token=SERVICE,
        owner_token=OWNER,
        log_level="warning",
    )
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def version_service(settings: Settings) -> AsyncIterator[Rig]:
    """Runs the service in this process; its channel shows no token by itself."""
    service = Service("version", migrations=MIGRATIONS, settings=settings)
    process = asyncio.create_task(serve(service))
    ready = asyncio.create_task(service.serving.wait())
    await asyncio.wait({process, ready}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    if process.done():
        await process
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield Rig(service, channel)
    service.stop()
    await process


@contextlib.asynccontextmanager
async def running(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    folder: Path,
    **more: object,
) -> AsyncIterator[Rig]:
    """Runs a version service on a database of its own."""
    url = await make_database_url("version")
    async with version_service(settings(url, nats_url, folder, **more)) as rig:
        yield rig
