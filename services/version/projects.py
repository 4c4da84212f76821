"""The gRPC servicer of projects. The methods are documented in the protos."""

from __future__ import annotations

from typing import Any, TypeAlias

from detflow.names import check_display_name, last_segment
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Database
from detflow.times import timestamp
from detflow.v1 import project_pb2, project_pb2_grpc
from services.version import domain, project_store

Context: TypeAlias = Any  # grpc.aio.ServicerContext, which no handler here needs


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
                await project_store.insert_project(conn, request.project_id, display_name)
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
        async with self._db.connection() as conn:
            projects = await project_store.list_projects(conn, int(key[0]), size + 1)
        more = len(projects) > size
        return project_pb2.ListProjectsResponse(
            projects=[_project_to_proto(project) for project in projects[:size]],
            next_page_token=encode_token("projects", projects[size - 1].position) if more else "",
        )


def _project_to_proto(project: domain.Project) -> project_pb2.Project:
    return project_pb2.Project(
        name=f"projects/{project.id}",
        display_name=project.display_name,
        create_time=timestamp(project.create_time),
    )
