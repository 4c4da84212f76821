"""What every call has to pass: whose token it is, how much its bearer calls, what it may do."""

from __future__ import annotations

import asyncio
import hmac
from types import TracebackType
from typing import Any, Final

import grpc

from detflow import access, policy
from detflow.access import Kind, Principal, Role
from detflow.audit import Audit, make_entry
from detflow.errors import DetflowError, NotFound, PermissionDenied
from detflow.identities import Identify, Identities
from detflow.limits import Limits
from detflow.settings import Settings
from detflow.v1 import access_pb2

_UNLISTED: Final = policy.Rule(role=Role.ADMIN, services_only=True)
_ANY_VALID: Final = policy.Rule(role=Role.ROLE_UNSPECIFIED)


class Guard:
    """Lets calls in.

    Args:
        settings: Tokens and limits.
        audit: Writes down who changes what.
        identify: Says whose the tokens are that the settings do not hold.
    """

    def __init__(self, settings: Settings, audit: Audit, identify: Identify) -> None:
        self._service_token = access.hash_token(settings.service_token)
        self._identities = Identities(identify)
        self.limits = Limits(settings.calls_per_second, settings.open_calls)
        self.audit = audit

    def admit(self, method: str, context: Any, request_id: str) -> Admission:
        """Returns what to enter around a call."""
        return Admission(self, method, context, request_id)

    async def identify(self, token: str) -> Principal:
        """Returns whose a token is.

        Raises:
            Unauthenticated: BAD_TOKEN.
            Unavailable: ACCESS_AWAY.
        """
        if hmac.compare_digest(access.hash_token(token), self._service_token):
            return access.SERVICE
        return await self._identities.identify(token)


class Admission:
    """One call on its way through the guard: `async with`, then `authorize` for each message."""

    __slots__ = (
        "_audited",
        "_context",
        "_entry",
        "_guard",
        "_method",
        "_request_id",
        "_rule",
        "_who",
    )

    def __init__(self, guard: Guard, method: str, context: Any, request_id: str) -> None:
        self._guard = guard
        self._method = method
        self._context = context
        self._request_id = request_id
        # What the table does not know is open to services only.
        unlisted = _UNLISTED if method.startswith("/detflow.") else _ANY_VALID
        self._rule = policy.RULES.get(method, unlisted)
        self._who: Principal | None = None
        self._entry: access_pb2.AuditEntry | None = None
        self._audited = False

    async def __aenter__(self) -> Admission:
        who = await self._guard.identify(
            access.read_token(self._context.invocation_metadata() or ())
        )
        if who.kind != Kind.SERVICE:
            self._guard.limits.enter(who.subject)
        self._who = who
        access.enter(who)
        return self

    async def authorize(self, request: Any) -> None:
        """Checks that the caller may send a message, before anybody acts on it.

        Raises:
            NotFound: As `policy.authorize`.
            PermissionDenied: As `policy.authorize`.
            InvalidArgument: As `policy.authorize`.
            Unavailable: It cannot be written down.
        """
        assert self._who is not None  # entered
        first = not self._audited
        try:
            policy.authorize(self._who, self._method, self._rule, request, first=first)
        except (NotFound, PermissionDenied) as error:
            if first and self._is_audited(request):
                self._audited = True
                entry = self._make_entry(request)
                await self._guard.audit.refused(entry, error.code)
            raise
        if first:
            self._audited = True
            if self._is_audited(request):
                entry = self._make_entry(request)
                await self._guard.audit.begun(entry)
                self._entry = entry

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._who is not None
        if self._who.kind != Kind.SERVICE:
            self._guard.limits.leave(self._who.subject)
        if self._entry is not None:
            await self._guard.audit.ended(self._entry, code_of(error))

    def _is_audited(self, request: Any) -> bool:
        assert self._who is not None
        return (
            self._rule.changes
            and self._who.kind != Kind.SERVICE
            and not getattr(request, "validate_only", False)
        )

    def _make_entry(self, request: Any) -> access_pb2.AuditEntry:
        assert self._who is not None
        return make_entry(
            subject=self._who.subject,
            method=self._method.strip("/"),
            resource=policy.resource_of(self._rule, request),
            request_id=self._request_id,
            peer=str(self._context.peer()),
        )


def code_of(error: BaseException | None) -> grpc.StatusCode:
    """Returns the status that a call ends with."""
    if error is None:
        return grpc.StatusCode.OK
    if isinstance(error, DetflowError):
        return error.code
    if isinstance(error, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.INTERNAL
