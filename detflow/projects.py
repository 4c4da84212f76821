"""Which projects there are, asked of the version service that owns them."""

from __future__ import annotations

from detflow import channels
from detflow.v1 import project_pb2, project_pb2_grpc


class Projects:
    """Checks that a project exists; one that does is remembered, for projects are not deleted.

    Args:
        stub: The version service's projects.
    """

    def __init__(self, stub: project_pb2_grpc.ProjectServiceAsyncStub) -> None:
        self._stub = stub
        self._known: set[str] = set()

    async def check(self, name: str) -> None:
        """Checks that projects/{project} exists.

        Raises:
            NotFound: It does not.
            Unavailable: The version service cannot say.
        """
        if name in self._known:
            return
        with channels.translate():
            await self._stub.GetProject(project_pb2.GetProjectRequest(name=name))
        self._known.add(name)
