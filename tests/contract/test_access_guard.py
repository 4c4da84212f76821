"""What every call has to pass, over real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from detflow import channels
from detflow.access import Role
from detflow.errors import NotFound, PermissionDenied, Unauthenticated
from detflow.events import Bus
from detflow.v1 import access_pb2, project_pb2
from tests import access_rig
from tests.access_rig import OWNER, Rig, bearer


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    settings = access_rig.settings(await make_database_url("version"), nats_url, tmp_path)
    async with access_rig.version_service(settings) as rig:
        yield rig


async def test_key_counts_in_its_project_until_it_is_deleted(rig: Rig) -> None:
    await rig.projects.CreateProject(
        project_pb2.CreateProjectRequest(
            project_id="other", project=project_pb2.Project(display_name="Other")
        ),
        metadata=bearer(OWNER),
    )
    key = await rig.create_key("projects/default", Role.VIEWER)
    mine = bearer(key.token)
    me = await rig.access.GetPrincipal(access_pb2.GetPrincipalRequest(), metadata=mine)
    assert (me.kind, me.subject) == (access_pb2.Principal.API_KEY, key.name)
    await rig.projects.GetProject(
        project_pb2.GetProjectRequest(name="projects/default"), metadata=mine
    )
    for name in ("projects/other", "projects/nowhere"):
        with pytest.raises(NotFound, match=f"{name} does not exist"), channels.translate():
            await rig.projects.GetProject(project_pb2.GetProjectRequest(name=name), metadata=mine)
    with (
        pytest.raises(PermissionDenied, match="takes ADMIN in projects/default"),
        channels.translate(),
    ):
        await rig.access.ListApiKeys(
            access_pb2.ListApiKeysRequest(parent="projects/default"), metadata=mine
        )
    await rig.access.DeleteApiKey(
        access_pb2.DeleteApiKeyRequest(name=key.name), metadata=bearer(OWNER)
    )
    with pytest.raises(Unauthenticated) as caught, channels.translate():
        await rig.access.Authenticate(
            access_pb2.AuthenticateRequest(token=key.token), metadata=bearer(access_rig.SERVICE)
        )
    assert caught.value.reason == "BAD_TOKEN"
    with pytest.raises(Unauthenticated) as caught, channels.translate():
        await rig.access.GetPrincipal(access_pb2.GetPrincipalRequest())
    assert caught.value.reason == "NO_TOKEN"
