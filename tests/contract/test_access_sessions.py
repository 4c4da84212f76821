"""Keys, members, links that sign a browser in, and the sessions they begin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from detflow import channels
from detflow.access import Role
from detflow.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from detflow.events import Bus
from detflow.times import timestamp
from detflow.v1 import access_pb2, project_pb2
from services.version import sessions
from services.version.tokens import Tokens
from tests import access_rig
from tests.access_rig import OWNER, SERVICE, Rig, bearer


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    async with access_rig.running(make_database_url, nats_url, tmp_path) as rig:
        yield rig


async def whose(rig: Rig, token: str) -> access_pb2.Principal:
    """Asks as the services do, so that nothing is remembered in between."""
    with channels.translate():
        return await rig.access.Authenticate(
            access_pb2.AuthenticateRequest(token=token), metadata=bearer(SERVICE)
        )


async def link(rig: Rig, token: str) -> str:
    """Returns the ticket of a link that signs in as whoever has the token."""
    made = await rig.access.CreateLoginLink(
        access_pb2.CreateLoginLinkRequest(), metadata=bearer(token)
    )
    assert made.expire_time.ToDatetime(UTC) <= datetime.now(UTC) + timedelta(seconds=60)
    return made.path.removeprefix("/login?ticket=")


async def begin(rig: Rig, ticket: str) -> access_pb2.Session:
    with channels.translate():
        return await rig.access.CreateSession(
            access_pb2.CreateSessionRequest(ticket=ticket), metadata=bearer(SERVICE)
        )


async def test_key_can_be_listed_changed_and_deleted_but_its_token_is_shown_once(rig: Rig) -> None:
    keys = [await rig.create_key("projects/default", Role.VIEWER) for _ in range(3)]
    assert len({key.token for key in keys}) == 3
    assert all(key.token.startswith("dfk_") and len(key.token) == 47 for key in keys)
    assert keys[0].creator == "owner"
    listed: list[access_pb2.ApiKey] = []
    token = ""
    while True:
        page = await rig.access.ListApiKeys(
            access_pb2.ListApiKeysRequest(parent="projects/default", page_size=2, page_token=token),
            metadata=bearer(OWNER),
        )
        listed += page.api_keys
        if not (token := page.next_page_token):
            break
    assert [key.name for key in listed] == [key.name for key in keys]
    assert not any(key.token for key in listed)
    end = timestamp(datetime.now(UTC) + timedelta(days=1))
    changed = await rig.access.UpdateApiKey(
        access_pb2.UpdateApiKeyRequest(
            api_key=access_pb2.ApiKey(name=keys[0].name, role=Role.EDITOR, expire_time=end)
        ),
        metadata=bearer(OWNER),
    )
    assert (changed.role, changed.expire_time, changed.display_name) == (Role.EDITOR, end, "test")
    assert (await whose(rig, keys[0].token)).grants[0].role == Role.EDITOR
    unlimited = await rig.access.UpdateApiKey(
        access_pb2.UpdateApiKeyRequest(
            api_key=access_pb2.ApiKey(name=keys[0].name),
            update_mask=FieldMask(paths=["expire_time"]),
        ),
        metadata=bearer(OWNER),
    )
    assert not unlimited.HasField("expire_time")
    assert unlimited.last_use_time.ToDatetime(UTC) > datetime.now(UTC) - timedelta(minutes=2)
    for wrong, path in (("role", "api_key.role"), ("display_name", "api_key.display_name")):
        with pytest.raises(InvalidArgument) as caught, channels.translate():
            await rig.access.UpdateApiKey(
                access_pb2.UpdateApiKeyRequest(
                    api_key=access_pb2.ApiKey(name=keys[0].name),
                    update_mask=FieldMask(paths=[wrong]),
                ),
                metadata=bearer(OWNER),
            )
        assert [v.field for v in caught.value.violations] == [path]
    await rig.access.DeleteApiKey(
        access_pb2.DeleteApiKeyRequest(name=keys[0].name), metadata=bearer(OWNER)
    )
    with pytest.raises(Unauthenticated):
        await whose(rig, keys[0].token)
    with pytest.raises(NotFound), channels.translate():
        await rig.access.DeleteApiKey(
            access_pb2.DeleteApiKeyRequest(name=keys[0].name), metadata=bearer(OWNER)
        )


async def test_key_counts_until_its_end_and_begins_with_none_that_is_over(rig: Rig) -> None:
    with pytest.raises(InvalidArgument, match="is over"), channels.translate():
        await rig.create_key(
            "projects/default", Role.VIEWER, expire_time=timestamp(datetime.now(UTC))
        )
    end = datetime.now(UTC) + timedelta(hours=1)
    key = await rig.create_key("projects/default", Role.VIEWER, expire_time=timestamp(end))
    assert (await whose(rig, key.token)).expire_time == timestamp(end)
    async with rig.service.db.connection() as conn:
        await conn.execute("update api_key set expire_time = now() - interval '1 second'")
    with pytest.raises(Unauthenticated) as ended:
        await whose(rig, key.token)
    with pytest.raises(Unauthenticated) as never:
        await whose(rig, "dfk_" + "x" * 43)
    assert ended.value.message == never.value.message
    assert (ended.value.reason, never.value.reason) == ("BAD_TOKEN", "BAD_TOKEN")


async def test_administrator_of_a_project_manages_that_project_only(rig: Rig) -> None:
    await rig.projects.CreateProject(
        project_pb2.CreateProjectRequest(
            project_id="other", project=project_pb2.Project(display_name="Other")
        ),
        metadata=bearer(OWNER),
    )
    admin = bearer((await rig.create_key("projects/default", Role.ADMIN)).token)

    async def create(parent: str, metadata: tuple[tuple[str, str], ...]) -> access_pb2.ApiKey:
        with channels.translate():
            return await rig.access.CreateApiKey(
                access_pb2.CreateApiKeyRequest(
                    parent=parent,
                    api_key=access_pb2.ApiKey(display_name="x", role=Role.VIEWER),
                ),
                metadata=metadata,
            )

    assert (await create("projects/default", admin)).creator.startswith("projects/default/apiKeys/")
    with pytest.raises(NotFound):
        await create("projects/other", admin)
    with pytest.raises(PermissionDenied, match="ADMIN in all projects"):
        await create("projects/-", admin)
    editor = bearer((await rig.create_key("projects/default", Role.EDITOR)).token)
    with pytest.raises(PermissionDenied, match="ADMIN in projects/default"):
        await create("projects/default", editor)
    with pytest.raises(NotFound, match="projects/nowhere"):
        await create("projects/nowhere", bearer(OWNER))
    listed = await rig.projects.ListProjects(project_pb2.ListProjectsRequest(), metadata=editor)
    assert [project.name for project in listed.projects] == ["projects/default"]
    with pytest.raises(PermissionDenied, match="ADMIN in all projects"), channels.translate():
        await rig.projects.CreateProject(
            project_pb2.CreateProjectRequest(
                project_id="mine", project=project_pb2.Project(display_name="Mine")
            ),
            metadata=admin,
        )


async def test_quota_is_for_the_administrator_of_all_projects_the_name_for_its_own(
    rig: Rig,
) -> None:
    admin = bearer((await rig.create_key("projects/default", Role.ADMIN)).token)
    project = project_pb2.Project(
        name="projects/default",
        display_name="Renamed",
        quota=project_pb2.Quota(max_storage_bytes=7, max_running_trainings=3),
    )

    async def update(
        paths: list[str], metadata: tuple[tuple[str, str], ...]
    ) -> project_pb2.Project:
        with channels.translate():
            return await rig.projects.UpdateProject(
                project_pb2.UpdateProjectRequest(
                    project=project, update_mask=FieldMask(paths=paths)
                ),
                metadata=metadata,
            )

    assert (await update(["display_name"], admin)).display_name == "Renamed"
    for paths in (["quota"], ["*"], ["display_name", "quota.max_storage_bytes"]):
        with pytest.raises(PermissionDenied, match="quota"):
            await update(paths, admin)
    changed = await update(["quota.max_running_trainings"], bearer(OWNER))
    assert changed.quota == project_pb2.Quota(max_running_trainings=3)
    assert (await update(["quota"], bearer(OWNER))).quota == project.quota
    read = await rig.projects.GetProject(
        project_pb2.GetProjectRequest(name="projects/default"), metadata=admin
    )
    assert (read.quota, read.display_name) == (project.quota, "Renamed")


async def test_member_is_one_once_in_a_project_whatever_the_spelling(rig: Rig) -> None:
    async def create(user: str, parent: str = "projects/default") -> access_pb2.Member:
        with channels.translate():
            return await rig.access.CreateMember(
                access_pb2.CreateMemberRequest(
                    parent=parent, member=access_pb2.Member(user=user, role=Role.VIEWER)
                ),
                metadata=bearer(OWNER),
            )

    member = await create("Ann@Example.com")
    assert member.user == "Ann@Example.com"
    with pytest.raises(AlreadyExists, match="change the role"):
        await create("ann@example.COM")
    await create("ann@example.com", "projects/-")
    await create("AbC")
    await create("abc")  # subjects are told apart by case
    changed = await rig.access.UpdateMember(
        access_pb2.UpdateMemberRequest(member=access_pb2.Member(name=member.name, role=Role.ADMIN)),
        metadata=bearer(OWNER),
    )
    assert changed.role == Role.ADMIN
    await rig.access.DeleteMember(
        access_pb2.DeleteMemberRequest(name=member.name), metadata=bearer(OWNER)
    )
    listed = await rig.access.ListMembers(
        access_pb2.ListMembersRequest(parent="projects/default"), metadata=bearer(OWNER)
    )
    assert [one.user for one in listed.members] == ["AbC", "abc"]


async def test_link_counts_once_however_many_try_at_the_same_time(rig: Rig) -> None:
    ticket = await link(rig, OWNER)
    barrier = asyncio.Barrier(8)

    async def attempt() -> access_pb2.Session | Exception:
        await barrier.wait()
        try:
            return await begin(rig, ticket)
        except Unauthenticated as error:
            return error

    results = await asyncio.gather(*(attempt() for _ in range(8)))
    begun = [one for one in results if isinstance(one, access_pb2.Session)]
    refused = [one for one in results if isinstance(one, Unauthenticated)]
    assert (len(begun), len(refused)) == (1, 7)
    assert {one.reason for one in refused} == {"BAD_TICKET"}
    assert (await whose(rig, begun[0].token)).subject == "owner"
    late = await link(rig, OWNER)
    async with rig.service.db.connection() as conn:
        await conn.execute("update login_ticket set expire_time = now() - interval '1 second'")
    with pytest.raises(Unauthenticated, match="detflow open"):
        await begin(rig, late)


async def test_session_is_whoever_began_it_with_the_role_of_now(rig: Rig) -> None:
    key = await rig.create_key("projects/default", Role.VIEWER)
    session = await begin(rig, await link(rig, key.token))
    assert session.token.startswith("dfs_") and len(session.token) == 47
    assert session.principal.subject == key.name
    await rig.access.UpdateApiKey(
        access_pb2.UpdateApiKeyRequest(api_key=access_pb2.ApiKey(name=key.name, role=Role.EDITOR)),
        metadata=bearer(OWNER),
    )
    assert (await whose(rig, session.token)).grants[0].role == Role.EDITOR
    again = await begin(rig, await link(rig, key.token))
    with pytest.raises(PermissionDenied, match="makes no links"), channels.translate():
        await rig.access.CreateLoginLink(
            access_pb2.CreateLoginLinkRequest(), metadata=bearer(again.token)
        )
    await rig.access.DeleteSession(
        access_pb2.DeleteSessionRequest(token=session.token), metadata=bearer(SERVICE)
    )
    with pytest.raises(Unauthenticated):
        await whose(rig, session.token)
    pending = await link(rig, key.token)
    await rig.access.DeleteApiKey(
        access_pb2.DeleteApiKeyRequest(name=key.name), metadata=bearer(OWNER)
    )
    with pytest.raises(Unauthenticated):
        await whose(rig, again.token)
    with pytest.raises(Unauthenticated):
        await begin(rig, pending)


async def test_session_of_the_owner_ends_with_the_owners_token(rig: Rig) -> None:
    session = await begin(rig, await link(rig, OWNER))
    same = Tokens(rig.service.db, OWNER)
    assert (await same.identify(session.token)).subject == "owner"
    with pytest.raises(Unauthenticated):
        await Tokens(rig.service.db, OWNER + "-new").identify(session.token)


async def test_session_moves_on_with_use_but_not_beyond_its_last_day(rig: Rig) -> None:
    session = await begin(rig, await link(rig, OWNER))
    async with rig.service.db.connection() as conn:
        await conn.execute("update session set expire_time = now() + interval '1 hour'")
        moved = (await whose(rig, session.token)).expire_time.ToDatetime(UTC)
        assert moved > datetime.now(UTC) + timedelta(hours=11)
        await conn.execute(
            "update session set expire_time = now() + interval '1 hour',"
            " end_time = now() + interval '2 hours'"
        )
        last = (await whose(rig, session.token)).expire_time.ToDatetime(UTC)
        assert last < datetime.now(UTC) + timedelta(hours=2, minutes=1)
        await conn.execute("update session set expire_time = now() - interval '1 second'")
        with pytest.raises(Unauthenticated):
            await whose(rig, session.token)
        await sessions.delete_ended(conn)
        assert not await conn.fetchval("select count(*) from session")


async def test_only_services_ask_whose_a_token_is_or_begin_sessions(rig: Rig) -> None:
    with pytest.raises(PermissionDenied, match="token of the services"), channels.translate():
        await rig.access.Authenticate(
            access_pb2.AuthenticateRequest(token="x"), metadata=bearer(OWNER)
        )
    with pytest.raises(PermissionDenied), channels.translate():
        await rig.access.CreateSession(
            access_pb2.CreateSessionRequest(ticket="x"), metadata=bearer(OWNER)
        )
    with pytest.raises(PermissionDenied, match="services do not sign in"), channels.translate():
        await rig.access.CreateLoginLink(
            access_pb2.CreateLoginLinkRequest(), metadata=bearer(SERVICE)
        )
