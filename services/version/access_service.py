"""The gRPC servicer of access: who may do what. The methods are documented in the protos."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, TypeAlias

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from detflow import access, audit, telemetry
from detflow.access import EVERYWHERE, Role
from detflow.errors import PermissionDenied, Unauthenticated, bad_field
from detflow.masks import check_mask
from detflow.names import check_display_name, new_id, project_of
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Connection, Database
from detflow.times import timestamp
from detflow.v1 import access_pb2, access_pb2_grpc
from services.version import access_store, audit_log, project_store, sessions
from services.version.access_store import ApiKey, Member
from services.version.tokens import API_KEY, SESSION, Tokens, new_token

log = telemetry.get_logger(__name__)

Context: TypeAlias = Any  # grpc.aio.ServicerContext, which no handler here needs

_PROJECT = r"projects/(-|[a-z0-9-]{1,63})"
_API_KEY_NAME = re.compile(_PROJECT + r"/apiKeys/([a-z0-9]{1,63})")
_MEMBER_NAME = re.compile(_PROJECT + r"/members/([a-z0-9]{1,63})")


class AccessService(access_pb2_grpc.AccessServiceServicer):
    """Serves principals, keys, members, sessions and the audit log.

    Who gets here has the role that the policy table says, ADMIN where something is given out: so
    nobody gives a role that is higher than the caller's own.

    Args:
        db: Database of this service.
        tokens: Says whose a token is.
    """

    def __init__(self, db: Database, tokens: Tokens) -> None:
        self._db = db
        self._tokens = tokens

    async def Authenticate(  # noqa: D102
        self, request: access_pb2.AuthenticateRequest, context: Context
    ) -> access_pb2.Principal:
        return access.to_proto(await self._tokens.identify(request.token))

    async def GetPrincipal(  # noqa: D102
        self, request: access_pb2.GetPrincipalRequest, context: Context
    ) -> access_pb2.Principal:
        return access.to_proto(access.current())

    async def CreateApiKey(  # noqa: D102
        self, request: access_pb2.CreateApiKeyRequest, context: Context
    ) -> access_pb2.ApiKey:
        project_id, wanted = project_of(request.parent), request.api_key
        token = new_token(API_KEY)
        display_name = check_display_name(wanted.display_name, "api_key.display_name")
        expire_time = _read_end(wanted)
        async with self._db.transaction() as conn:
            await _check_project(conn, project_id)
            key = await access_store.insert_api_key(
                conn,
                key_id=new_id(),
                project_id=project_id,
                display_name=display_name,
                role=wanted.role,
                token_sha256=access.hash_token(token),
                expire_time=expire_time,
                creator=access.current().subject,
            )
        log.info("API key created", api_key=key.name)
        message = _api_key_to_proto(key)
        message.token = token
        return message

    async def ListApiKeys(  # noqa: D102
        self, request: access_pb2.ListApiKeysRequest, context: Context
    ) -> access_pb2.ListApiKeysResponse:
        query = f"API keys of {request.parent}"
        after = decode_token(request.page_token, query) or [""]
        size = page_size(request.page_size)
        project_id = project_of(request.parent)
        async with self._db.connection() as conn:
            await _check_project(conn, project_id)
            keys = await access_store.list_api_keys(conn, project_id, str(after[0]), size + 1)
        return access_pb2.ListApiKeysResponse(
            api_keys=map(_api_key_to_proto, keys[:size]),
            next_page_token=encode_token(query, keys[size - 1].id) if len(keys) > size else "",
        )

    async def UpdateApiKey(  # noqa: D102
        self, request: access_pb2.UpdateApiKeyRequest, context: Context
    ) -> access_pb2.ApiKey:
        wanted, fields = request.api_key, ("display_name", "role", "expire_time")
        project_id, key_id = _parse(_API_KEY_NAME, wanted.name, "api_key.name")
        check_mask(request.update_mask, *fields)
        paths = set(request.update_mask.paths)
        if not paths or "*" in paths:
            paths = {*fields} if paths else {field.name for field, _ in wanted.ListFields()}
        if "role" in paths:
            _check_role(wanted.role, "api_key.role")
        if "display_name" in paths:
            check_display_name(wanted.display_name, "api_key.display_name")
        expire_time = _read_end(wanted) if "expire_time" in paths else None
        async with self._db.transaction() as conn:
            key = await access_store.get_api_key(conn, project_id, key_id, lock=True)
            key = await access_store.update_api_key(
                conn,
                key.id,
                display_name=wanted.display_name if "display_name" in paths else key.display_name,
                role=wanted.role if "role" in paths else key.role,
                expire_time=expire_time if "expire_time" in paths else key.expire_time,
            )
        return _api_key_to_proto(key)

    async def DeleteApiKey(  # noqa: D102
        self, request: access_pb2.DeleteApiKeyRequest, context: Context
    ) -> access_pb2.DeleteApiKeyResponse:
        project_id, key_id = _parse(_API_KEY_NAME, request.name, "name")
        async with self._db.transaction() as conn:
            key = await access_store.get_api_key(conn, project_id, key_id, lock=True)
            await access_store.delete_api_key(conn, key.id)
        log.info("API key deleted", api_key=key.name)
        return access_pb2.DeleteApiKeyResponse()

    async def CreateMember(  # noqa: D102
        self, request: access_pb2.CreateMemberRequest, context: Context
    ) -> access_pb2.Member:
        project_id, user = project_of(request.parent), request.member.user.strip()
        if not user or not user.isprintable():
            raise bad_field(
                "member.user", "BAD_USER", f"must be an e-mail address or a subject, not {user!r}"
            )
        async with self._db.transaction() as conn:
            await _check_project(conn, project_id)
            member = await access_store.insert_member(
                conn,
                member_id=new_id(),
                project_id=project_id,
                user=user,
                role=request.member.role,
                creator=access.current().subject,
            )
        log.info("member created", member=member.name)
        return _member_to_proto(member)

    async def ListMembers(  # noqa: D102
        self, request: access_pb2.ListMembersRequest, context: Context
    ) -> access_pb2.ListMembersResponse:
        query = f"members of {request.parent}"
        after = decode_token(request.page_token, query) or [""]
        size = page_size(request.page_size)
        project_id = project_of(request.parent)
        async with self._db.connection() as conn:
            await _check_project(conn, project_id)
            members = await access_store.list_members(conn, project_id, str(after[0]), size + 1)
        return access_pb2.ListMembersResponse(
            members=map(_member_to_proto, members[:size]),
            next_page_token=encode_token(query, members[size - 1].id)
            if len(members) > size
            else "",
        )

    async def UpdateMember(  # noqa: D102
        self, request: access_pb2.UpdateMemberRequest, context: Context
    ) -> access_pb2.Member:
        project_id, member_id = _parse(_MEMBER_NAME, request.member.name, "member.name")
        check_mask(request.update_mask, "role")
        _check_role(request.member.role, "member.role")
        async with self._db.transaction() as conn:
            member = await access_store.get_member(conn, project_id, member_id, lock=True)
            return _member_to_proto(
                await access_store.update_member(conn, member.id, request.member.role)
            )

    async def DeleteMember(  # noqa: D102
        self, request: access_pb2.DeleteMemberRequest, context: Context
    ) -> access_pb2.DeleteMemberResponse:
        project_id, member_id = _parse(_MEMBER_NAME, request.name, "name")
        async with self._db.transaction() as conn:
            member = await access_store.get_member(conn, project_id, member_id, lock=True)
            await access_store.delete_member(conn, member.id)
        log.info("member deleted", member=member.name)
        return access_pb2.DeleteMemberResponse()

    async def CreateLoginLink(  # noqa: D102
        self, request: access_pb2.CreateLoginLinkRequest, context: Context
    ) -> access_pb2.LoginLink:
        given = dict(context.invocation_metadata() or ()).get(access.METADATA, "")
        if f" {SESSION}" in given:
            raise PermissionDenied(
                "a browser that is signed in makes no links, or it could stay so for ever; use"
                " 'detflow open', or sign in where you want to be",
                reason="SESSION_MAKES_NO_LINK",
            )
        holder, ticket = self._tokens.holder(access.current()), new_token("")
        async with self._db.transaction() as conn:
            end = await sessions.insert_ticket(conn, access.hash_token(ticket), holder)
        return access_pb2.LoginLink(path=f"/login?ticket={ticket}", expire_time=timestamp(end))

    async def CreateSession(  # noqa: D102
        self, request: access_pb2.CreateSessionRequest, context: Context
    ) -> access_pb2.Session:
        token, holder = new_token(SESSION), None
        if request.id_token:
            holder = await self._tokens.holder_of_id_token(request.id_token, request.nonce)
        async with self._db.transaction() as conn:
            if request.ticket:
                holder = await sessions.delete_ticket(conn, access.hash_token(request.ticket))
            if holder is None:
                raise _bad_ticket()
            session = await sessions.insert_session(conn, access.hash_token(token), holder)
            principal = await self._tokens.principal(conn, session)
            if principal is None:
                raise _bad_ticket()
            # The call is the gateway's; who signs in is known only now.
            entry = audit.make_entry(
                subject=principal.subject,
                method="detflow.v1.AccessService/CreateSession",
                resource="",
                request_id=str(structlog.contextvars.get_contextvars().get("request_id", "")),
                peer=str(context.peer()),
            )
            entry.done = True
            await audit.append(conn, entry, "ended")
        log.info("session begun", subject=principal.subject)
        return access_pb2.Session(
            token=token,
            principal=access.to_proto(principal),
            expire_time=timestamp(session.expire_time),
        )

    async def DeleteSession(  # noqa: D102
        self, request: access_pb2.DeleteSessionRequest, context: Context
    ) -> access_pb2.DeleteSessionResponse:
        async with self._db.transaction() as conn:
            await sessions.delete_session(conn, access.hash_token(request.token))
        return access_pb2.DeleteSessionResponse()

    async def ListAuditEntries(  # noqa: D102
        self, request: access_pb2.ListAuditEntriesRequest, context: Context
    ) -> access_pb2.ListAuditEntriesResponse:
        query = repr(("audit", request.parent, request.subject, request.resource))
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        project_id = project_of(request.parent)
        async with self._db.connection() as conn:
            await _check_project(conn, project_id)
            entries = await audit_log.list_entries(
                conn,
                project_id,
                subject=request.subject,
                resource=request.resource,
                before=str(key[0]) if key else None,
                limit=size + 1,
            )
        more = len(entries) > size
        return access_pb2.ListAuditEntriesResponse(
            audit_entries=entries[:size],
            next_page_token=encode_token(query, entries[size - 1].id) if more else "",
        )


def _bad_ticket() -> Unauthenticated:
    return Unauthenticated(
        "the link was used already or has ended; make another with 'detflow open'",
        reason="BAD_TICKET",
    )


async def _check_project(conn: Connection, project_id: str) -> None:
    if project_id != EVERYWHERE:
        await project_store.get_project(conn, project_id)


def _parse(pattern: re.Pattern[str], name: str, field: str) -> tuple[str, str]:
    """Returns the ids of the project and of what is in it."""
    found = pattern.fullmatch(name)
    if found is None:
        kind = "apiKeys/{api_key}" if pattern is _API_KEY_NAME else "members/{member}"
        raise bad_field(
            field, "BAD_RESOURCE_NAME", f"must be projects/{{project}}/{kind}, not {name!r}"
        )
    return found[1], found[2]


def _check_role(role: Role.ValueType, field: str) -> None:
    if not role:
        raise bad_field(field, "BAD_ROLE", "must be one of VIEWER, EDITOR, ADMIN")


def _read_end(wanted: access_pb2.ApiKey) -> datetime | None:
    if not wanted.HasField("expire_time"):
        return None
    end: Timestamp = wanted.expire_time
    try:
        time = end.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise bad_field(
            "api_key.expire_time", "BAD_TIME", "must be a time from the years 1 to 9999"
        ) from error
    if time <= datetime.now(UTC):
        raise bad_field(
            "api_key.expire_time",
            "BAD_TIME",
            f"{time.isoformat()} is over; give a time to come, or none for a key without an end",
        )
    return time


def _api_key_to_proto(key: ApiKey) -> access_pb2.ApiKey:
    return access_pb2.ApiKey(
        name=key.name,
        display_name=key.display_name,
        role=key.role,
        expire_time=timestamp(key.expire_time),
        create_time=timestamp(key.create_time),
        creator=key.creator,
        last_use_time=timestamp(key.last_use_time),
    )


def _member_to_proto(member: Member) -> access_pb2.Member:
    return access_pb2.Member(
        name=member.name,
        user=member.user,
        role=member.role,
        create_time=timestamp(member.create_time),
        creator=member.creator,
    )
