"""Who calls: what a token stands for, and what its bearer may do."""

from __future__ import annotations

import contextvars
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

from detflow.errors import InvalidArgument, Unauthenticated
from detflow.settings import Settings
from detflow.times import timestamp
from detflow.v1 import access_pb2

Kind = access_pb2.Principal.Kind
Role = access_pb2.Role

EVERYWHERE: Final = "-"
"""Instead of the id of a project: all there are and will be."""
METADATA: Final = "authorization"
"""Metadata, or HTTP header, in which a token travels."""
_MAX_TOKEN_LENGTH = 8192
_SECRET = re.compile(r"[!-~]{32,}")
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([!-~]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Somebody who calls.

    Attributes:
        kind: How it has shown who it is.
        subject: Who: "owner", "service", "users/{e-mail or subject}", or the name of an API key.
        display_name: Name shown to people.
        roles: What it may do, by the id of the project; "-" is all of them.
        expire_time: When its token ends; None if it does not.
    """

    kind: Kind.ValueType
    subject: str
    display_name: str
    roles: Mapping[str, Role.ValueType]
    expire_time: datetime | None = None

    def role_in(self, project_id: str) -> Role.ValueType:
        """Returns its role in a project, ROLE_UNSPECIFIED if it has none; "-": in all projects."""
        none = Role.ROLE_UNSPECIFIED
        return max(self.roles.get(project_id, none), self.roles.get(EVERYWHERE, none))


OWNER: Final = Principal(
    kind=Kind.OWNER, subject="owner", display_name="Owner", roles={EVERYWHERE: Role.ADMIN}
)
SERVICE: Final = Principal(
    kind=Kind.SERVICE, subject="service", display_name="Service", roles={EVERYWHERE: Role.ADMIN}
)

_current: contextvars.ContextVar[Principal] = contextvars.ContextVar("principal")


def current() -> Principal:
    """Returns who calls; the owner where access is open.

    Raises:
        LookupError: This is no call, and nobody must be taken for somebody.
    """
    return _current.get()


def enter(principal: Principal) -> None:
    """Says who calls, for the rest of this task."""
    _current.set(principal)


def to_proto(principal: Principal) -> access_pb2.Principal:
    """Renders a principal, its grants sorted by project."""
    return access_pb2.Principal(
        kind=principal.kind,
        subject=principal.subject,
        display_name=principal.display_name,
        grants=[
            access_pb2.Grant(project=f"projects/{project_id}", role=role)
            for project_id, role in sorted(principal.roles.items())
        ],
        expire_time=timestamp(principal.expire_time) if principal.expire_time else None,
    )


def from_proto(message: access_pb2.Principal) -> Principal:
    """Reads what `to_proto` rendered."""
    return Principal(
        kind=message.kind,
        subject=message.subject,
        display_name=message.display_name,
        roles={grant.project.removeprefix("projects/"): grant.role for grant in message.grants},
        expire_time=message.expire_time.ToDatetime(UTC)
        if message.HasField("expire_time")
        else None,
    )


def hash_token(token: str) -> bytes:
    """Returns the SHA-256 of a token: what is kept of it, and what it is compared by."""
    return hashlib.sha256(token.encode()).digest()


def read_token(metadata: Iterable[tuple[str, Any]]) -> str:
    """Returns the token that came with a call.

    Raises:
        Unauthenticated: NO_TOKEN, or BAD_TOKEN if it cannot be one.
    """
    given = [*{value for key, value in metadata if key == METADATA}]
    if not given:
        raise Unauthenticated(
            "this takes a token: send it as 'authorization: Bearer TOKEN'; the command line and the"
            " SDKs take it from DETFLOW_TOKEN, and a browser from 'detflow open'",
            reason="NO_TOKEN",
        )
    found = _BEARER.fullmatch(given[0]) if isinstance(given[0], str) else None
    if len(given) > 1 or found is None or len(found[1]) > _MAX_TOKEN_LENGTH:
        raise bad_token()
    return found[1]


def bad_token() -> Unauthenticated:
    """Makes the error for a token that does not count, whatever the reason."""
    return Unauthenticated(
        "the token does not count, or not any more: it may have ended or been deleted; ask an"
        " administrator for a new one, or sign in again",
        reason="BAD_TOKEN",
    )


def check_settings(settings: Settings) -> None:
    """Checks that a process can tell its callers apart, or that only this machine reaches it.

    Raises:
        InvalidArgument: MISSING_SETTING or BAD_SETTING.
    """
    if settings.access == "open":
        for variable, address in (
            ("DETFLOW_LISTEN", settings.listen),
            ("DETFLOW_HTTP_LISTEN", settings.http_listen),
        ):
            if not is_local(address):
                raise InvalidArgument(
                    f"{variable} is {address}, where others can reach it, and DETFLOW_ACCESS=open"
                    " would let them do everything: listen on 127.0.0.1, or set"
                    " DETFLOW_ACCESS=required",
                    reason="BAD_SETTING",
                )
        return
    if settings.access != "required":
        raise InvalidArgument(
            f"DETFLOW_ACCESS must be required or open, not {settings.access!r}",
            reason="BAD_SETTING",
        )
    settings.require("service_token")
    for name in ("service_token", "owner_token"):
        token = getattr(settings, name)
        if token and not _SECRET.fullmatch(token):
            raise InvalidArgument(
                f"DETFLOW_{name.upper()} must have 32 characters or more, of ASCII and without"
                " spaces; make one with 'openssl rand -hex 32'",
                reason="BAD_SETTING",
            )
    if settings.service_token == settings.owner_token:
        raise InvalidArgument(
            "DETFLOW_SERVICE_TOKEN and DETFLOW_OWNER_TOKEN must differ", reason="BAD_SETTING"
        )


def check_issuer(settings: Settings) -> None:
    """Checks what the settings say of the OIDC issuer.

    Raises:
        InvalidArgument: MISSING_SETTING or BAD_SETTING.
    """
    settings.require("oidc_client_id")
    if not is_trusted(settings.oidc_issuer):
        raise InvalidArgument(
            f"DETFLOW_OIDC_ISSUER must be an https:// URL, not {settings.oidc_issuer!r}",
            reason="BAD_SETTING",
        )


def is_trusted(url: str) -> bool:
    """Whether nobody in between can change what a URL answers: HTTPS, or this machine."""
    parts = urlsplit(url)
    plain = parts.scheme == "http" and is_loopback(parts.hostname or "")
    return bool(parts.hostname) and (parts.scheme == "https" or plain)


def is_local(address: str) -> bool:
    """Whether host:port is reached from this machine only."""
    return is_loopback(address.rsplit(":", 1)[0])


def is_loopback(host: str) -> bool:
    """Whether a host is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
