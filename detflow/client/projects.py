"""Projects: groups of datasets and versions."""

import contextlib
from collections.abc import Sequence

from detflow.client.connection import Connection, pages
from detflow.errors import AlreadyExists, NotFound
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
        """Lists all projects, oldest first."""

        def fetch(token: str) -> tuple[Sequence[project_pb2.Project], str]:
            request = project_pb2.ListProjectsRequest(page_size=1000, page_token=token)
            response = self._connection.call(self._stub.ListProjects, request)
            return response.projects, response.next_page_token

        return [*pages(fetch)]

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
