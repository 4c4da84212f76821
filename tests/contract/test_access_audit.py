"""The audit log: an entry for each call that changes something, whatever comes of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import grpc.aio
import pytest

from detflow import channels
from detflow.access import Role
from detflow.errors import AlreadyExists, NotFound, PermissionDenied
from detflow.events import Bus, Delivered
from detflow.local.process import free_port
from detflow.names import new_id
from detflow.v1 import access_pb2, access_pb2_grpc, events_pb2, project_pb2, project_pb2_grpc
from services.version import audit_log
from tests import access_rig
from tests.access_rig import OWNER, SERVICE, Rig, bearer
from tests.deployment_rig import eventually

Entry = access_pb2.AuditEntry
LOST = "projects/lost"


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    async with access_rig.running(make_database_url, nats_url, tmp_path) as rig:
        yield rig


async def entries(
    access: access_pb2_grpc.AccessServiceAsyncStub, parent: str = "projects/-", **more: Any
) -> list[Entry]:
    page = await access.ListAuditEntries(
        access_pb2.ListAuditEntriesRequest(parent=parent, **more), metadata=bearer(OWNER)
    )
    return list(page.audit_entries)


async def create_project(rig: Rig, project_id: str, token: str = OWNER) -> None:
    with channels.translate():
        await rig.projects.CreateProject(
            project_pb2.CreateProjectRequest(
                project_id=project_id, project=project_pb2.Project(display_name="x")
            ),
            metadata=(*bearer(token), ("x-request-id", f"request-{project_id}")),
        )


async def test_entry_says_who_did_what_to_what_and_how_it_went(rig: Rig) -> None:
    await create_project(rig, "p1")
    with pytest.raises(AlreadyExists):
        await create_project(rig, "p1")
    key = await rig.create_key("projects/p1", Role.VIEWER)
    with pytest.raises(PermissionDenied):
        await create_project(rig, "p2", key.token)
    with pytest.raises(NotFound), channels.translate():
        await rig.access.DeleteApiKey(
            access_pb2.DeleteApiKeyRequest(name="projects/default/apiKeys/k"),
            metadata=bearer(key.token),
        )
    # What changes nothing leaves no entry, and neither do the services.
    await rig.access.GetPrincipal(access_pb2.GetPrincipalRequest(), metadata=bearer(key.token))
    await create_project(rig, "p3", SERVICE)
    # Signing in does, as whoever signs in, though it is the gateway that calls.
    link = await rig.access.CreateLoginLink(
        access_pb2.CreateLoginLinkRequest(), metadata=bearer(key.token)
    )
    ticket = link.path.removeprefix("/login?ticket=")
    await rig.access.CreateSession(
        access_pb2.CreateSessionRequest(ticket=ticket), metadata=bearer(SERVICE)
    )
    found = await eventually(
        lambda: entries(rig.access), lambda found: sum(one.done for one in found) == 7
    )
    assert [
        (one.subject, one.method.split("/")[1], one.resource, one.project, one.code)
        for one in reversed(found)
    ] == [
        ("owner", "CreateProject", "projects/p1", "projects/p1", 0),
        ("owner", "CreateProject", "projects/p1", "projects/p1", 6),
        ("owner", "CreateApiKey", "projects/p1", "projects/p1", 0),
        (key.name, "CreateProject", "projects/p2", "projects/p2", 7),
        (key.name, "DeleteApiKey", "projects/default/apiKeys/k", "projects/default", 5),
        (key.name, "CreateLoginLink", "", "", 0),
        (key.name, "CreateSession", "", "", 0),
    ]
    first = found[-1]
    assert first.request_id == "request-p1"
    assert first.peer.startswith("ipv4:127.0.0.1:")
    assert len(await entries(rig.access, "projects/p1")) == 3
    assert [one.code for one in await entries(rig.access, subject=key.name)] == [0, 0, 5, 7]
    below = await entries(rig.access, resource="projects/default")
    assert [one.resource for one in below] == ["projects/default/apiKeys/k"]
    assert not await entries(rig.access, resource="projects/defaul")
    pages, token = [], ""
    while True:
        page = await rig.access.ListAuditEntries(
            access_pb2.ListAuditEntriesRequest(parent="projects/-", page_size=2, page_token=token),
            metadata=bearer(OWNER),
        )
        pages.append([one.id for one in page.audit_entries])
        if not (token := page.next_page_token):
            break
    assert list(itertools.chain(*pages)) == [one.id for one in found]
    assert [len(page) for page in pages] == [2, 2, 2, 1]
    admin = (await rig.create_key("projects/p1", Role.ADMIN)).token
    mine = await rig.access.ListAuditEntries(
        access_pb2.ListAuditEntriesRequest(parent="projects/p1"), metadata=bearer(admin)
    )
    assert {one.project for one in mine.audit_entries} == {"projects/p1"}
    with pytest.raises(PermissionDenied), channels.translate():
        await rig.access.ListAuditEntries(
            access_pb2.ListAuditEntriesRequest(parent="projects/-"), metadata=bearer(admin)
        )


async def test_entry_comes_out_the_same_in_whichever_order_its_events_come(rig: Rig) -> None:
    def event(entry_id: str, *, done: bool) -> Delivered[events_pb2.Event]:
        entry = Entry(id=entry_id, subject="s", method="m", done=done, code=5 * done)
        entry.create_time.GetCurrentTime()
        message: Any = events_pb2.Event(audit=entry)
        return Delivered(
            event_id="e",
            subject="",
            kind="audit",
            resource_id=entry_id,
            what="",
            name="",
            seq=0,
            stream_seq=0,
            message=message,
            carrier={},
        )

    async with rig.service.db.connection() as conn:
        for order in itertools.permutations([False, True, False, True]):
            entry_id = new_id()
            for done in order:
                await audit_log.project(conn, event(entry_id, done=done))
            row = await conn.fetchrow("select done, code from audit_entry where id = $1", entry_id)
            assert row is not None
            assert tuple(row) == (True, 5), order
        await conn.execute("update audit_entry set create_time = now() - interval '399 days'")
        await audit_log.project(conn, event("d0", done=False))
        await audit_log.delete_old(conn)
        assert await conn.fetchval("select count(*) from audit_entry") == 25
        await conn.execute("update audit_entry set create_time = now() - interval '401 days'")
        await audit_log.delete_old(conn)
        assert not await conn.fetchval("select count(*) from audit_entry")


async def test_call_whose_process_is_killed_leaves_an_entry_without_an_end(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> None:
    url, port = await make_database_url("version"), free_port()
    settings = access_rig.settings(url, nats_url, tmp_path)
    names = ("database_url", "nats_url", "store_url", "service_token", "owner_token")
    environment = {
        **os.environ,
        **{f"DETFLOW_{name.upper()}": getattr(settings, name) for name in names},
        "DETFLOW_LISTEN": f"127.0.0.1:{port}",
        "DETFLOW_DATA_DIR": str(tmp_path / "data"),
        "DETFLOW_LOG_LEVEL": "warning",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.version", env=environment
    )
    holder = await asyncpg.connect(url, server_settings={"search_path": "version"})
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            projects = project_pb2_grpc.ProjectServiceStub(channel)
            listing = projects.ListProjects(
                project_pb2.ListProjectsRequest(), metadata=bearer(OWNER), wait_for_ready=True
            )
            await listing
            async with holder.transaction():
                await holder.execute("lock table project in exclusive mode")
                call = asyncio.ensure_future(
                    projects.CreateProject(
                        project_pb2.CreateProjectRequest(
                            project_id="lost", project=project_pb2.Project(display_name="Lost")
                        ),
                        metadata=bearer(OWNER),
                    )
                )
                await eventually(
                    lambda: holder.fetchval("select count(*) from outbox where name = $1", LOST),
                    lambda count: count == 1,
                )
                process.kill()
                await process.wait()
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
        assert await holder.fetchval("select count(*) from outbox where name = $1", LOST) == 1
    finally:
        await holder.close()
        if process.returncode is None:
            process.kill()
            await process.wait()
    async with access_rig.version_service(settings) as rig:
        (entry,) = await eventually(lambda: entries(rig.access), bool)
        assert (entry.resource, entry.done) == (LOST, False)
        with pytest.raises(NotFound), channels.translate():
            await rig.projects.GetProject(
                project_pb2.GetProjectRequest(name=LOST), metadata=bearer(OWNER)
            )
