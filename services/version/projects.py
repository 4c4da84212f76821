"""The gRPC servicer of projects. The methods are documented in the protos."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeAlias

from detflow import access
from detflow.errors import PermissionDenied, bad_field
from detflow.masks import check_mask
from detflow.names import check_display_name, last_segment
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Database
from detflow.times import timestamp
from detflow.v1 import project_pb2, project_pb2_grpc
from services.version import domain, project_store

Context: TypeAlias = Any  # grpc.aio.ServicerContext, which no handler here needs

_NAME = re.compile(r"projects/[a-z0-9-]{1,63}")
_QUOTA = ("quota.max_storage_bytes", "quota.max_running_trainings")


class ProjectService(project_pb2_grpc.ProjectServiceServicer):
    """Serves projects."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def CreateProject(  # noqa: D102
        self, request: project_pb2.CreateProjectRequest, context: Context
    ) -> project_pb2.Project:
        display_name = check_display_name(request.project.display_name, "project.display_name")
        async with self._db.transaction() as conn:
            return _project_to_proto(
                await project_store.insert_project(
                    conn,
                    request.project_id,
                    display_name,
                    max_storage_bytes=request.project.quota.max_storage_bytes,
                    max_running_trainings=request.project.quota.max_running_trainings,
                )
            )

    async def GetProject(  # noqa: D102
        self, request: project_pb2.GetProjectRequest, context: Context
    ) -> project_pb2.Project:
        async with self._db.connection() as conn:
            return _project_to_proto(
                await project_store.get_project(conn, last_segment(request.name))
            )

    async def ListProjects(  # noqa: D102
        self, request: project_pb2.ListProjectsRequest, context: Context
    ) -> project_pb2.ListProjectsResponse:
        key = decode_token(request.page_token, "projects", int) or [0]
        size = page_size(request.page_size)
        roles = access.current().roles
        visible = None if access.EVERYWHERE in roles else [*roles]
        async with self._db.connection() as conn:
            projects = await project_store.list_projects(conn, visible, int(key[0]), size + 1)
        more = len(projects) > size
        return project_pb2.ListProjectsResponse(
            projects=[_project_to_proto(project) for project in projects[:size]],
            next_page_token=encode_token("projects", projects[size - 1].position) if more else "",
        )

    async def UpdateProject(  # noqa: D102
        self, request: project_pb2.UpdateProjectRequest, context: Context
    ) -> project_pb2.Project:
        wanted = request.project
        if not _NAME.fullmatch(wanted.name):
            raise bad_field(
                "project.name",
                "BAD_RESOURCE_NAME",
                f"must be projects/{{project}}, not {wanted.name!r}",
            )
        check_mask(request.update_mask, "display_name", "quota", *_QUOTA)
        paths = set(request.update_mask.paths)
        if "*" in paths:
            paths = {"display_name", "quota"}
        if "quota" in paths:
            paths |= {*_QUOTA}
        if "display_name" in paths:
            check_display_name(wanted.display_name, "project.display_name")
        if paths & {*_QUOTA} and access.current().role_in(access.EVERYWHERE) < access.Role.ADMIN:
            raise PermissionDenied(
                "a quota takes ADMIN in all projects, since it protects the installation; ask its"
                " administrator",
                reason="MISSING_ROLE",
            )
        async with self._db.transaction() as conn:
            project = await project_store.get_project(conn, last_segment(wanted.name), lock=True)
            if "display_name" in paths:
                project = replace(project, display_name=wanted.display_name)
            for path in paths & {*_QUOTA}:
                field = path.removeprefix("quota.")
                project = replace(project, **{field: getattr(wanted.quota, field)})
            return _project_to_proto(await project_store.update_project(conn, project))


def _project_to_proto(project: domain.Project) -> project_pb2.Project:
    return project_pb2.Project(
        name=f"projects/{project.id}",
        display_name=project.display_name,
        create_time=timestamp(project.create_time),
        quota=project_pb2.Quota(
            max_storage_bytes=project.max_storage_bytes,
            max_running_trainings=project.max_running_trainings,
        ),
    )
