"""How much one principal may call, over a real server; services are not limited."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from detflow.access import Role
from detflow.errors import InvalidArgument
from detflow.events import Bus
from detflow.v1 import access_pb2, project_pb2, version_pb2
from tests import access_rig
from tests.access_rig import OWNER, SERVICE, Rig, bearer
from tests.deployment_rig import eventually


async def list_projects(rig: Rig, token: str) -> list[str]:
    """Returns what is wrong, if anything: the reason and the seconds to wait."""
    try:
        await rig.projects.ListProjects(project_pb2.ListProjectsRequest(), metadata=bearer(token))
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        assert status is not None
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(info)
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.seconds > 0
        return [info.reason]
    return []


async def test_who_calls_too_often_waits_and_nobody_else_does(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> None:
    # So slow that a test cannot wait for the next call: one at once, one in a thousand seconds.
    async with access_rig.running(
        make_database_url, nats_url, tmp_path, calls_per_second=0.001
    ) as rig:
        key = await rig.create_key("projects/default", Role.VIEWER)
        for token in (OWNER, key.token):
            assert await list_projects(rig, token) == ["RATE_LIMIT"] * (token == OWNER)
            assert await list_projects(rig, token) == ["RATE_LIMIT"]
        assert [await list_projects(rig, SERVICE) for _ in range(20)] == [[]] * 20


async def test_calls_under_way_are_limited_until_some_end(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> None:
    async with access_rig.running(make_database_url, nats_url, tmp_path, open_calls=2) as rig:
        request = version_pb2.WatchVersionsRequest(parent="projects/default")
        watches = [rig.versions.WatchVersions(request, metadata=bearer(OWNER)) for _ in range(2)]
        for watch in watches:
            await watch.read()
        assert await list_projects(rig, OWNER) == ["TOO_MANY_CALLS"]
        assert await list_projects(rig, SERVICE) == []
        watches[0].cancel()
        await eventually(lambda: list_projects(rig, OWNER), lambda wrong: not wrong)
        watches[1].cancel()


async def test_settings_that_let_everybody_in_ask_nobody(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> None:
    async with access_rig.running(
        make_database_url, nats_url, tmp_path, access="open", calls_per_second=0.001
    ) as rig:
        for _ in range(3):
            me = await rig.access.GetPrincipal(access_pb2.GetPrincipalRequest())
            assert (me.subject, me.grants[0].project) == ("owner", "projects/-")


@pytest.mark.parametrize("missing", ["service_token", "owner_token"])
async def test_version_service_does_not_start_without_its_tokens(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
    missing: str,
) -> None:
    with pytest.raises(InvalidArgument, match=f"set DETFLOW_{missing.upper()}"):
        async with access_rig.running(make_database_url, nats_url, tmp_path, **{missing: ""}):
            pass
