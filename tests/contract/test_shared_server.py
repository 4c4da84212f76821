"""The service process around a servicer: validation, errors, health, reflection, drain."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from detflow import channels
from detflow.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable, Violation
from detflow.server import Service
from detflow.settings import Settings
from detflow.v1 import (
    project_pb2,
    project_pb2_grpc,
    version_pb2,
    version_pb2_grpc,
)
from detflow.watch import Snapshot


class Projects(project_pb2_grpc.ProjectServiceServicer):
    async def GetProject(self, request: project_pb2.GetProjectRequest, context: Any) -> Any:
        if request.name.endswith("/gone"):
            raise NotFound(f"{request.name} does not exist")
        if request.name.endswith("/broken"):
            raise RuntimeError("secret text")
        if request.name.endswith("/verbose"):
            violation = Violation("field" * 100, "WRONG", "so " * 1000)
            raise InvalidArgument("틀림" * 5000, violations=[violation] * 100)
        return project_pb2.Project(name=request.name)

    async def CreateProject(self, request: project_pb2.CreateProjectRequest, context: Any) -> Any:
        raise AlreadyExists("there is one", reason="DUPLICATE_NAME", metadata={"name": "x"})


class Versions(version_pb2_grpc.VersionServiceServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def WatchVersions(
        self, request: version_pb2.WatchVersionsRequest, context: Any
    ) -> AsyncIterator[version_pb2.WatchVersionsResponse]:
        async def snapshot() -> Snapshot[None]:
            return Snapshot(None, {})

        async for item in self._service.watcher.follow(
            subjects=["detflow.v1.version.>"], cursor=request.cursor, snapshot=snapshot
        ):
            yield version_pb2.WatchVersionsResponse(
                cursor=item.cursor, snapshot=version_pb2.VersionsSnapshot()
            )


@pytest.fixture
async def service(
    make_database_url: Callable[[str], Awaitable[str]], nats_url: str, bus: Any, tmp_path: Path
) -> AsyncIterator[Service]:
    settings = Settings(
        database_url=await make_database_url("version"),
        nats_url=nats_url,
        store_url=f"file://{tmp_path}/store",
        data_dir=tmp_path / "scratch",
        access="open",
    )
    async with Service("version", migrations=None, settings=settings) as service:
        projects: Any = Projects  # the generated base is abstract in its methods
        versions: Any = Versions
        service.add(project_pb2_grpc.add_ProjectServiceServicer_to_server, projects())
        service.add(version_pb2_grpc.add_VersionServiceServicer_to_server, versions(service))
        served = asyncio.create_task(service.serve())
        await service.serving.wait()
        yield service
        service.stop()
        await served


async def test_broken_rule_names_the_field(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        stub = project_pb2_grpc.ProjectServiceStub(channel)
        with pytest.raises(InvalidArgument) as caught, channels.translate():
            await stub.CreateProject(
                project_pb2.CreateProjectRequest(
                    project_id="Bad Id", project=project_pb2.Project(display_name="a\u202eb")
                )
            )
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["project_id", "project.display_name"]


async def test_raised_error_arrives_as_the_same_class_with_details(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        stub = project_pb2_grpc.ProjectServiceStub(channel)
        with pytest.raises(NotFound, match="projects/gone does not exist"), channels.translate():
            await stub.GetProject(project_pb2.GetProjectRequest(name="projects/gone"))
        with pytest.raises(AlreadyExists) as caught, channels.translate():
            await stub.CreateProject(
                project_pb2.CreateProjectRequest(
                    project_id="ok", project=project_pb2.Project(display_name="한글 😀")
                )
            )
    assert caught.value.reason == "DUPLICATE_NAME"
    assert caught.value.metadata == {"name": "x"}


async def test_defect_is_internal_with_a_request_id_and_without_its_text(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        stub = project_pb2_grpc.ProjectServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.GetProject(project_pb2.GetProjectRequest(name="projects/broken"))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)
    call: Any = caught.value
    status = rpc_status.from_call(call)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    assert info.metadata["request_id"] in status.message


@pytest.mark.parametrize("data", [b"\xff\xff", b"\0" * 8, b"\x0a\x03\xff\xfe\xfd"])
async def test_bytes_that_are_no_message_are_invalid_and_no_defect(
    service: Service, data: bytes
) -> None:
    async with channels.channel(service.address) as channel:
        for method in ("ProjectService/GetProject", "VersionService/WatchVersions"):
            call: Any = channel.unary_stream(f"/detflow.v1.{method}", bytes, bytes)
            with pytest.raises(InvalidArgument) as caught, channels.translate():
                async for _ in call(data):
                    pass
            assert caught.value.reason == "MALFORMED_MESSAGE"


async def test_nul_in_text_is_refused_with_its_field(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        stub = version_pb2_grpc.VersionServiceStub(channel)
        with pytest.raises(InvalidArgument) as caught, channels.translate():
            await stub.CreateVersion(
                version_pb2.CreateVersionRequest(
                    parent="projects/p",
                    version=version_pb2.Version(class_names=["a", "b\0"]),
                    request_id="a\0b",
                )
            )
    found = [(one.field, one.reason) for one in caught.value.violations]
    assert found == [("version.class_names[1]", "BAD_TEXT"), ("request_id", "BAD_TEXT")]


async def test_error_with_many_long_violations_fits_into_the_headers(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        stub = project_pb2_grpc.ProjectServiceStub(channel)
        with pytest.raises(InvalidArgument) as caught, channels.translate():
            await stub.GetProject(project_pb2.GetProjectRequest(name="projects/verbose"))
    assert caught.value.total == 100
    assert 5 <= len(caught.value.violations) < 100
    assert caught.value.message.startswith("틀림")


async def test_request_id_that_is_too_long_is_not_repeated(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        stub = project_pb2_grpc.ProjectServiceStub(channel)
        for given, same in (("mine-1", True), ("x" * 65, False), ("a b", False)):
            call: Any = stub.GetProject(
                project_pb2.GetProjectRequest(name="projects/p"),
                metadata=[("x-request-id", given)],
            )
            await call
            answered = dict(await call.trailing_metadata())["x-request-id"]
            assert (answered == given) is same


async def test_drain_ends_a_watch_with_unavailable(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        stub = version_pb2_grpc.VersionServiceStub(channel)
        call: Any = stub.WatchVersions(version_pb2.WatchVersionsRequest(parent="projects/p"))
        assert (await call.read()).cursor
        service.stop()
        with pytest.raises(Unavailable, match="reconnect"), channels.translate():
            while await call.read():  # EOF is falsy
                pass


async def test_health_and_reflection_answer(service: Service) -> None:
    async with channels.channel(service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="detflow.v1.VersionService"))
        async with asyncio.timeout(10):
            async for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        watch.cancel()

        async def question() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(question())
        services = (await call.read()).list_services_response.service
        assert {"detflow.v1.VersionService", "detflow.v1.ProjectService"} <= {
            s.name for s in services
        }
