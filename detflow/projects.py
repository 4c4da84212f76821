"""Which projects there are, asked of the version service that owns them."""

from __future__ import annotations

import time

from detflow import channels, telemetry
from detflow.errors import Unavailable
from detflow.v1 import project_pb2, project_pb2_grpc

log = telemetry.get_logger(__name__)

_QUOTA_SECONDS = 5.0


class Projects:
    """Checks that a project exists; one that does is remembered, for projects are not deleted.

    Quotas may change: each is asked for again after some seconds.

    Args:
        stub: The version service's projects.
        quota_seconds: How long what was said of a quota counts.
    """

    def __init__(
        self,
        stub: project_pb2_grpc.ProjectServiceAsyncStub,
        *,
        quota_seconds: float = _QUOTA_SECONDS,
    ) -> None:
        self._stub = stub
        self._quota_seconds = quota_seconds
        self._known: set[str] = set()
        self._quotas: dict[str, tuple[project_pb2.Quota, float]] = {}

    async def check(self, name: str) -> None:
        """Checks that projects/{project} exists.

        Raises:
            NotFound: It does not.
            Unavailable: The version service cannot say.
        """
        if name in self._known:
            return
        await self._get(name)

    async def quota(self, name: str) -> project_pb2.Quota:
        """Returns the quota of projects/{project}; while nobody can say, what it was last.

        Raises:
            NotFound: There is no such project.
            Unavailable: The version service cannot say, and never has.
        """
        known, until = self._quotas.get(name, (None, 0.0))
        if known is not None and time.monotonic() < until:
            return known
        try:
            return await self._get(name)
        except Unavailable as error:
            if known is None:
                raise
            log.warning("quota may be outdated", project=name, error=error.message)
            self._quotas[name] = (known, time.monotonic() + self._quota_seconds)
            return known

    async def _get(self, name: str) -> project_pb2.Quota:
        with channels.translate():
            project = await self._stub.GetProject(project_pb2.GetProjectRequest(name=name))
        self._known.add(name)
        self._quotas[name] = (project.quota, time.monotonic() + self._quota_seconds)
        return project.quota
