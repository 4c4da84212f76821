"""API keys: tokens for programs."""

import datetime
from collections.abc import Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from detflow.client.access import role_of
from detflow.client.connection import Connection, pages
from detflow.client.projects import DEFAULT_PROJECT
from detflow.errors import InvalidArgument, NotFound
from detflow.v1 import access_pb2, access_pb2_grpc


class Keys:
    """Calls about API keys."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = access_pb2_grpc.AccessServiceStub(connection.channel("version"))

    def create(
        self,
        name: str,
        *,
        role: str = "viewer",
        project: str = DEFAULT_PROJECT,
        expires: datetime.datetime | datetime.timedelta | None = None,
    ) -> access_pb2.ApiKey:
        """Creates an API key; `token` of the answer is not shown again.

        Args:
            name: What it is for.
            role: "viewer", "editor" or "admin".
            project: Id of the project it counts in; "-" is all of them.
            expires: When, or after how long, it counts no more; None: not before it is deleted.

        Raises:
            InvalidArgument: The role is none, or the end is in the past.
            PermissionDenied: The caller is no admin of the project.
        """
        key = access_pb2.ApiKey(display_name=name, role=role_of(role))
        if expires is not None:
            key.expire_time.CopyFrom(_time_of(expires))
        request = access_pb2.CreateApiKeyRequest(parent=f"projects/{project}", api_key=key)
        return self._connection.call(self._stub.CreateApiKey, request)

    def list(self, project: str = DEFAULT_PROJECT) -> Sequence[access_pb2.ApiKey]:
        """Lists the API keys of a project, oldest first, without their tokens.

        Args:
            project: Id of the project; "-" lists the keys that count in all.

        Raises:
            PermissionDenied: The caller is no admin of the project.
        """

        def fetch(token: str) -> tuple[Sequence[access_pb2.ApiKey], str]:
            request = access_pb2.ListApiKeysRequest(
                parent=f"projects/{project}", page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListApiKeys, request)
            return response.api_keys, response.next_page_token

        return [*pages(fetch)]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> access_pb2.ApiKey:
        """Gets an API key by resource name, id or display name.

        Args:
            text: What names it.
            project: Id of the project; "-" looks among the keys that count in all.

        Raises:
            InvalidArgument: Several are called so.
            NotFound: There is none.
        """
        if text.startswith("projects/"):
            project = text.split("/")[1]
        called = [
            key
            for key in self.list(project)
            if text in (key.name, key.name.rsplit("/", 1)[-1], key.display_name)
        ]
        if len(called) > 1:
            raise InvalidArgument(
                f"{len(called)} API keys are called {text!r}: name one by its id, as"
                " `detflow keys list` shows it",
                reason="AMBIGUOUS_NAME",
            )
        if not called:
            raise NotFound(
                f"no API key {text!r} in project {project}: see `detflow keys list`",
                metadata={"api_key": text},
            )
        return called[0]

    def update(
        self,
        name: str,
        *,
        display_name: str | None = None,
        role: str | None = None,
        expires: datetime.datetime | datetime.timedelta | None = None,
        never_expires: bool = False,
    ) -> access_pb2.ApiKey:
        """Changes what is given.

        Args:
            name: Resource name.
            display_name: What it is for.
            role: "viewer", "editor" or "admin".
            expires: When, or after how long from now, it counts no more.
            never_expires: It counts until it is deleted.

        Raises:
            InvalidArgument: Nothing is given, the role is none, or the end is in the past.
            NotFound: There is no such key.
        """
        key, paths = access_pb2.ApiKey(name=name), []
        if display_name is not None:
            key.display_name = display_name
            paths.append("display_name")
        if role is not None:
            key.role = role_of(role)
            paths.append("role")
        if expires is not None:
            key.expire_time.CopyFrom(_time_of(expires))
        if expires is not None or never_expires:
            paths.append("expire_time")
        if not paths:
            raise InvalidArgument(
                "nothing to change: give a name, a role or an end", reason="NO_CHANGE"
            )
        request = access_pb2.UpdateApiKeyRequest(api_key=key, update_mask=FieldMask(paths=paths))
        return self._connection.call(self._stub.UpdateApiKey, request)

    def delete(self, name: str) -> None:
        """Deletes an API key: within ten seconds nobody is let in with it.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such key.
        """
        self._connection.call(self._stub.DeleteApiKey, access_pb2.DeleteApiKeyRequest(name=name))


def _time_of(expires: datetime.datetime | datetime.timedelta) -> Timestamp:
    if isinstance(expires, datetime.timedelta):
        expires = datetime.datetime.now(datetime.UTC) + expires
    if expires.tzinfo is None:
        raise InvalidArgument(
            f"{expires} has no time zone: say datetime(..., tzinfo=UTC)", reason="BAD_TIME"
        )
    time = Timestamp()
    time.FromDatetime(expires)
    return time
