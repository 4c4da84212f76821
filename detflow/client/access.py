"""Who is calling, and how a browser is signed in as the same."""

from collections.abc import Mapping

from detflow.client.connection import Connection
from detflow.errors import InvalidArgument
from detflow.v1 import access_pb2, access_pb2_grpc

ALL_PROJECTS = "-"
"""Instead of the id of a project: all there are and will be."""
ROLES: Mapping[str, access_pb2.Role.ValueType] = {
    "viewer": access_pb2.Role.VIEWER,
    "editor": access_pb2.Role.EDITOR,
    "admin": access_pb2.Role.ADMIN,
}
"""What somebody may do, by its short name; each includes those before it."""


class Access:
    """Calls about whoever calls."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = access_pb2_grpc.AccessServiceStub(connection.channel("version"))

    def principal(self) -> access_pb2.Principal:
        """Says who is calling and what the caller may do.

        Raises:
            Unauthenticated: There is no token, or one that does not count.
        """
        return self._connection.call(self._stub.GetPrincipal, access_pb2.GetPrincipalRequest())

    def login_link(self) -> access_pb2.LoginLink:
        """Makes a link that signs one browser in as the caller; its `path` is the gateway's.

        Example:
            print(f"http://127.0.0.1:7100{client.access.login_link().path}")

        Raises:
            Unauthenticated: There is no token, or one that does not count.
        """
        request = access_pb2.CreateLoginLinkRequest()
        return self._connection.call(self._stub.CreateLoginLink, request)


def role_of(name: str) -> access_pb2.Role.ValueType:
    """Reads a role.

    Raises:
        InvalidArgument: It is none.
    """
    if name not in ROLES:
        raise InvalidArgument(f"role {name!r} is none of {', '.join(ROLES)}", reason="UNKNOWN_ROLE")
    return ROLES[name]
