"""Members: people who have a role in a project, or in all of them."""

from collections.abc import Sequence

from google.protobuf.field_mask_pb2 import FieldMask

from detflow.client.access import role_of
from detflow.client.connection import Connection, pages
from detflow.client.projects import DEFAULT_PROJECT
from detflow.errors import NotFound
from detflow.v1 import access_pb2, access_pb2_grpc


class Members:
    """Calls about members."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = access_pb2_grpc.AccessServiceStub(connection.channel("version"))

    def create(
        self, user: str, *, role: str = "viewer", project: str = DEFAULT_PROJECT
    ) -> access_pb2.Member:
        """Makes a person a member.

        Args:
            user: E-mail address that the OIDC issuer has verified, or the subject there.
            role: "viewer", "editor" or "admin".
            project: Id of the project; "-" is all of them.

        Raises:
            AlreadyExists: The person is a member there.
            PermissionDenied: The caller is no admin of the project.
        """
        member = access_pb2.Member(user=user, role=role_of(role))
        request = access_pb2.CreateMemberRequest(parent=f"projects/{project}", member=member)
        return self._connection.call(self._stub.CreateMember, request)

    def list(self, project: str = DEFAULT_PROJECT) -> Sequence[access_pb2.Member]:
        """Lists the members of a project, oldest first.

        Args:
            project: Id of the project; "-" lists the members of all.

        Raises:
            PermissionDenied: The caller is no admin of the project.
        """

        def fetch(token: str) -> tuple[Sequence[access_pb2.Member], str]:
            request = access_pb2.ListMembersRequest(
                parent=f"projects/{project}", page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListMembers, request)
            return response.members, response.next_page_token

        return [*pages(fetch)]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> access_pb2.Member:
        """Gets a member by resource name, id, e-mail address or subject.

        Args:
            text: What names the person.
            project: Id of the project; "-" looks among the members of all.

        Raises:
            NotFound: There is none.
        """
        if text.startswith("projects/"):
            project = text.split("/")[1]
        for member in self.list(project):
            named = (member.name, member.name.rsplit("/", 1)[-1], member.user)
            if text in named or text.casefold() == member.user.casefold():
                return member
        raise NotFound(
            f"{text!r} is no member of project {project}: see `detflow members list`",
            metadata={"member": text},
        )

    def update(self, name: str, *, role: str) -> access_pb2.Member:
        """Gives a member another role.

        Args:
            name: Resource name.
            role: "viewer", "editor" or "admin".

        Raises:
            NotFound: There is no such member.
        """
        request = access_pb2.UpdateMemberRequest(
            member=access_pb2.Member(name=name, role=role_of(role)),
            update_mask=FieldMask(paths=["role"]),
        )
        return self._connection.call(self._stub.UpdateMember, request)

    def delete(self, name: str) -> None:
        """Takes a person's membership away; it counts within ten seconds.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such member.
        """
        self._connection.call(self._stub.DeleteMember, access_pb2.DeleteMemberRequest(name=name))
