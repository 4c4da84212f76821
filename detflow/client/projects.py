"""Projects: groups of datasets and versions."""

import contextlib
from collections.abc import Sequence

from google.protobuf.field_mask_pb2 import FieldMask

from detflow.client.connection import Connection, pages
from detflow.errors import AlreadyExists, InvalidArgument, NotFound
from detflow.v1 import project_pb2, project_pb2_grpc

DEFAULT_PROJECT = "default"


class Projects:
    """Calls about projects."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = project_pb2_grpc.ProjectServiceStub(connection.channel("version"))

    def create(self, project_id: str, *, display_name: str = "") -> project_pb2.Project:
        """Creates a project; the id is lower-case letters, digits and hyphens.

        Args:
            project_id: Lower-case letters, digits and hyphens.
            display_name: Name shown to people; by default the id.

        Raises:
            AlreadyExists: There is a project with this id.
            InvalidArgument: The id is none.
        """
        return self._connection.call(
            self._stub.CreateProject,
            project_pb2.CreateProjectRequest(
                project_id=project_id,
                project=project_pb2.Project(display_name=display_name or project_id),
            ),
        )

    def get(self, project_id: str) -> project_pb2.Project:
        """Gets a project.

        Args:
            project_id: Id of the project.

        Raises:
            NotFound: There is no such project.
        """
        request = project_pb2.GetProjectRequest(name=f"projects/{project_id}")
        return self._connection.call(self._stub.GetProject, request)

    def list(self) -> Sequence[project_pb2.Project]:
        """Lists the projects that the caller may see, oldest first."""

        def fetch(token: str) -> tuple[Sequence[project_pb2.Project], str]:
            request = project_pb2.ListProjectsRequest(page_size=1000, page_token=token)
            response = self._connection.call(self._stub.ListProjects, request)
            return response.projects, response.next_page_token

        return [*pages(fetch)]

    def update(
        self,
        project_id: str,
        *,
        display_name: str | None = None,
        max_storage_bytes: int | None = None,
        max_running_trainings: int | None = None,
    ) -> project_pb2.Project:
        """Changes what is given.

        Args:
            project_id: Id of the project.
            display_name: Name shown to people.
            max_storage_bytes: Bytes of its datasets, uploads and bundles; 0 sets no limit.
            max_running_trainings: Trainings that may run at once; 0 sets no limit.

        Raises:
            InvalidArgument: Nothing is given, or a value is out of range.
            NotFound: There is no such project.
            PermissionDenied: The caller is no admin; for the limits, of all projects.
        """
        changes = {
            "display_name": display_name,
            "quota.max_storage_bytes": max_storage_bytes,
            "quota.max_running_trainings": max_running_trainings,
        }
        given = [path for path, value in changes.items() if value is not None]
        if not given:
            raise InvalidArgument("nothing to change: give a name or a limit", reason="NO_CHANGE")
        project = project_pb2.Project(
            name=f"projects/{project_id}",
            display_name=display_name or "",
            quota=project_pb2.Quota(
                max_storage_bytes=max_storage_bytes or 0,
                max_running_trainings=max_running_trainings or 0,
            ),
        )
        request = project_pb2.UpdateProjectRequest(
            project=project, update_mask=FieldMask(paths=given)
        )
        return self._connection.call(self._stub.UpdateProject, request)

    def ensure(self, project_id: str) -> None:
        """Creates a project unless it is there.

        Args:
            project_id: Id of the project.
        """
        try:
            self.get(project_id)
        except NotFound:
            # Someone else may be as quick.
            with contextlib.suppress(AlreadyExists):
                self.create(project_id)
