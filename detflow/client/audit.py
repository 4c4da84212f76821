"""The audit log: who changed what, or tried to."""

from collections.abc import Sequence
from itertools import islice

from detflow.client.access import ALL_PROJECTS
from detflow.client.connection import Connection, pages
from detflow.v1 import access_pb2, access_pb2_grpc


class Audit:
    """Calls about the audit log."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = access_pb2_grpc.AccessServiceStub(connection.channel("version"))

    def list(
        self,
        project: str = ALL_PROJECTS,
        *,
        subject: str = "",
        resource: str = "",
        limit: int | None = None,
    ) -> Sequence[access_pb2.AuditEntry]:
        """Lists the calls that changed something, or were to, newest first.

        Args:
            project: Id of the project; "-" lists everything, with what concerns the installation.
            subject: Only of this one, such as "owner" or "users/kim@example.com"; "" is of all.
            resource: Only on the resource of this name and what is below it; "" is on all.
            limit: How many at most; None means all.

        Raises:
            PermissionDenied: The caller is no admin of the project, or of all.
        """
        size = min(limit or 1000, 1000)

        def fetch(token: str) -> tuple[Sequence[access_pb2.AuditEntry], str]:
            request = access_pb2.ListAuditEntriesRequest(
                parent=f"projects/{project}",
                page_size=size,
                page_token=token,
                subject=subject,
                resource=resource,
            )
            response = self._connection.call(self._stub.ListAuditEntries, request)
            return response.audit_entries, response.next_page_token

        return [*islice(pages(fetch), limit)]
