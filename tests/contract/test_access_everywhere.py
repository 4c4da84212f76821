"""Every method of every service, called by everybody who may not and by somebody who may.

Against the whole stack: what is checked is what runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from detflow.access import Role
from detflow.local.running import owner_token
from detflow.v1 import access_pb2, access_pb2_grpc, project_pb2, project_pb2_grpc
from tests import access_requests
from tests.access_requests import Method
from tests.access_rig import bearer
from tests.stack_rig import Stack

METHODS = sorted(access_requests.methods(), key=lambda method: method.name)
_SERVICES = {
    "Access": 1,
    "Project": 1,
    "Version": 1,
    "Dataset": 2,
    "Preprocess": 2,
    "Trainer": 3,
    "Export": 3,
    "Weights": 3,
}
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@dataclass(frozen=True)
class Answer:
    """How a call ended; `status` are the bytes of the google.rpc.Status."""

    code: grpc.StatusCode
    message: str
    status: bytes

    @property
    def reason(self) -> str:
        for detail in status_pb2.Status.FromString(self.status).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                return str(info.reason)
        return ""


@dataclass
class Callers:
    """Channels to the four services, and the tokens of those who call."""

    channels: Sequence[grpc.aio.Channel]
    owner: str
    viewer: str = ""
    editor: str = ""
    admin: str = ""
    stranger: str = ""
    deleted: str = ""

    async def call(
        self, name: str, request: bytes, *, token: str = "", port: int | None = None
    ) -> Answer:
        """Sends one message and ends; of a stream's answers the first is enough."""
        if port is None:
            service = name.split("/")[1].rsplit(".", 1)[1].removesuffix("Service")
            port = _SERVICES.get(service, 4)
        # One message and the end of them at once: what fits every kind of method.
        method = self.channels[port - 1].unary_stream(name, bytes, bytes)
        call = method(request, metadata=bearer(token) if token else None, timeout=30)
        if await _first(call) is not None:
            call.cancel()
            return Answer(grpc.StatusCode.OK, "", b"")
        trailers = {str(key): value for key, value in await call.trailing_metadata()}
        details = trailers.get("grpc-status-details-bin", b"")
        assert isinstance(details, bytes)
        return Answer(await call.code(), str(await call.details() or ""), details)

    async def ask(self, method: Method, *, token: str = "", project: str = "open1") -> Answer:
        return await self.call(
            method.name, method.request(project).SerializeToString(), token=token
        )


async def _first(call: Any) -> bytes | None:
    try:
        async for message in call:
            return bytes(message)
    except grpc.aio.AioRpcError:
        pass
    return None


@asynccontextmanager
async def callers(stack: Stack) -> AsyncIterator[Callers]:
    """Makes two projects and a key for each kind of caller."""
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{stack.port + n}") for n in range(1, 5)]
    made = Callers(channels, owner_token(stack.data_dir))
    mine = bearer(made.owner)
    access = access_pb2_grpc.AccessServiceStub(channels[0])
    projects = project_pb2_grpc.ProjectServiceStub(channels[0])
    known = await projects.ListProjects(project_pb2.ListProjectsRequest(), metadata=mine)
    for project_id in {"open1", "shut1"} - {p.name.split("/")[1] for p in known.projects}:
        await projects.CreateProject(
            project_pb2.CreateProjectRequest(
                project_id=project_id, project=project_pb2.Project(display_name=project_id)
            ),
            metadata=mine,
        )

    async def key(parent: str, role: Role.ValueType) -> access_pb2.ApiKey:
        return await access.CreateApiKey(
            access_pb2.CreateApiKeyRequest(
                parent=parent, api_key=access_pb2.ApiKey(display_name="k", role=role)
            ),
            metadata=mine,
        )

    made.viewer = (await key("projects/open1", Role.VIEWER)).token
    made.editor = (await key("projects/open1", Role.EDITOR)).token
    made.admin = (await key("projects/open1", Role.ADMIN)).token
    made.stranger = (await key("projects/default", Role.ADMIN)).token
    gone = await key("projects/open1", Role.ADMIN)
    await access.DeleteApiKey(access_pb2.DeleteApiKeyRequest(name=gone.name), metadata=mine)
    made.deleted = gone.token
    try:
        yield made
    finally:
        for channel in channels:
            await channel.close(None)


def by_method(answers: Sequence[Answer]) -> dict[str, Answer]:
    return {m.name: answer for m, answer in zip(METHODS, answers, strict=True)}


async def test_no_method_answers_who_shows_no_token_that_counts(stack: Stack) -> None:
    async with callers(stack) as c:
        for token, reason in (
            ("", "NO_TOKEN"),
            ("dfk_" + "x" * 43, "BAD_TOKEN"),
            ("dfs_" + "x" * 43, "BAD_TOKEN"),
            ("a.b.c", "BAD_TOKEN"),
            (c.deleted, "BAD_TOKEN"),
        ):
            answers = await asyncio.gather(*(c.ask(m, token=token) for m in METHODS))
            for name, answer in by_method(answers).items():
                assert answer.code == grpc.StatusCode.UNAUTHENTICATED, (name, token, answer)
                assert answer.reason == reason, (name, token)
            assert len({answer.status for answer in answers}) == 1
        for port in range(1, 5):
            for name in (_REFLECTION, "/detflow.v1.VersionService/Nonsense", "/no.such.Thing/At"):
                for token, reason in (("", "NO_TOKEN"), ("x" * 40, "BAD_TOKEN")):
                    answer = await c.call(name, b"", token=token, port=port)
                    assert (answer.code, answer.reason) == (
                        grpc.StatusCode.UNAUTHENTICATED,
                        reason,
                    ), (name, port)
            lost = await c.call(
                "/detflow.v1.VersionService/Nonsense", b"", token=c.viewer, port=port
            )
            assert lost.code == grpc.StatusCode.UNIMPLEMENTED
            listed = await c.call(
                _REFLECTION,
                reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString(),
                token=c.viewer,
                port=port,
            )
            assert listed.code == grpc.StatusCode.OK
            health = health_pb2_grpc.HealthStub(c.channels[port - 1])
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1


async def test_who_has_no_role_in_a_project_cannot_tell_whether_it_is_there(stack: Stack) -> None:
    named = [method for method in METHODS if method.rule.field]
    async with callers(stack) as c:
        for token in (c.stranger, c.viewer, c.admin):
            there = await asyncio.gather(
                *(c.ask(method, token=token, project="shut1") for method in named)
            )
            nowhere = await asyncio.gather(
                *(c.ask(method, token=token, project="gone1") for method in named)
            )
            for method, one, other in zip(named, there, nowhere, strict=True):
                assert one.code == grpc.StatusCode.NOT_FOUND, (method.name, one)
                assert one.message == "projects/shut1 does not exist"
                assert one.status.replace(b"shut1", b"gone1") == other.status, method.name


async def test_each_role_passes_where_it_is_enough_and_only_there(stack: Stack) -> None:
    async with callers(stack) as c:
        for role, token in (
            (Role.VIEWER, c.viewer),
            (Role.EDITOR, c.editor),
            (Role.ADMIN, c.admin),
        ):
            answers = await asyncio.gather(*(c.ask(m, token=token) for m in METHODS))
            for method, answer in zip(METHODS, answers, strict=True):
                rule = method.rule
                enough = role >= rule.role and (rule.field or not rule.role)
                if rule.services_only or not enough:
                    assert answer.code == grpc.StatusCode.PERMISSION_DENIED, (method.name, answer)
                    assert answer.reason == "MISSING_ROLE"
                else:
                    assert answer.code not in (
                        grpc.StatusCode.PERMISSION_DENIED,
                        grpc.StatusCode.UNAUTHENTICATED,
                        grpc.StatusCode.INTERNAL,
                        grpc.StatusCode.UNKNOWN,
                    ), (method.name, answer)
                    assert answer.message != "projects/open1 does not exist", method.name
        answers = await asyncio.gather(*(c.ask(m, token=c.owner) for m in METHODS))
        for method, answer in zip(METHODS, answers, strict=True):
            denied = answer.code == grpc.StatusCode.PERMISSION_DENIED
            assert denied == method.rule.services_only, (method.name, answer)


async def test_viewer_of_one_project_learns_nothing_by_naming_another_beside_it(
    stack: Stack,
) -> None:
    """A name in a further field, as in a comparison of trainings of two projects."""
    async with callers(stack) as c:
        for method in METHODS:
            if "trainings" not in method.rule.also:
                continue
            statuses = []
            for other in ("shut1", "gone1"):
                request = method.request("open1")
                request.trainings[1] = f"projects/{other}/versions/v1/trainings/t2"  # type: ignore[attr-defined]
                answer = await c.call(method.name, request.SerializeToString(), token=c.viewer)
                assert answer.code == grpc.StatusCode.NOT_FOUND
                statuses.append(answer.status.replace(b"shut1", b"gone1"))
            assert statuses[0] == statuses[1]


@pytest.mark.parametrize("header", ["Basic abc", "Bearer", "Bearer  ", "abc", "Bearer a b"])
async def test_header_that_shows_no_token_is_refused(stack: Stack, header: str) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stack.port + 1}") as channel:
        stub = project_pb2_grpc.ProjectServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListProjects(
                project_pb2.ListProjectsRequest(), metadata=(("authorization", header),)
            )
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
