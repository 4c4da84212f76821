"""Whose a token is: the owner's, an API key, a session, or a JWT of the OIDC issuer."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from detflow import access
from detflow.access import Kind, Principal
from detflow.errors import FailedPrecondition, PermissionDenied
from detflow.names import last_segment
from detflow.postgres import Connection, Database
from services.version import access_store, sessions
from services.version.access_store import ApiKey
from services.version.oidc import Issuer, User
from services.version.sessions import Holder, Session

API_KEY = "dfk_"
SESSION = "dfs_"
USERS = "users/"


class Tokens:
    """Knows every token of the installation but the services' own.

    Args:
        db: Database of the version service.
        owner_token: The token that may do everything; "" if there is none.
        issuer: Whose ID tokens count; None if nobody's do.
    """

    def __init__(self, db: Database, owner_token: str, issuer: Issuer | None = None) -> None:
        self._db = db
        self._owner_sha256 = access.hash_token(owner_token) if owner_token else b""
        self._issuer = issuer

    async def identify(self, token: str) -> Principal:
        """Returns whose a token is.

        Raises:
            Unauthenticated: BAD_TOKEN: it never counted, has ended or was deleted.
            Unavailable: The database is away.
        """
        token_hash = access.hash_token(token)
        if hmac.compare_digest(token_hash, self._owner_sha256):
            return access.OWNER
        if self._issuer is not None and token.count(".") == 2:
            return await self._of_user(await self._issuer.verify(token))
        async with self._db.connection() as conn:
            principal = await self._find(conn, token, token_hash)
        if principal is None:
            raise access.bad_token()
        return principal

    async def holder_of_id_token(self, id_token: str, nonce: str) -> Holder:
        """Returns whom a session that an ID token begins stands for.

        Raises:
            Unauthenticated: BAD_TOKEN.
            FailedPrecondition: NO_ISSUER.
            Unavailable: ISSUER_AWAY.
        """
        if self._issuer is None:
            raise FailedPrecondition(
                "nobody signs in with an issuer here; set DETFLOW_OIDC_ISSUER", reason="NO_ISSUER"
            )
        user = await self._issuer.verify(id_token, nonce)
        return Holder(user_keys=user.keys, display_name=user.display_name)

    def holder(self, principal: Principal) -> Holder:
        """Returns whom a ticket for a principal's browser stands for.

        Raises:
            PermissionDenied: SERVICE_HAS_NO_BROWSER.
        """
        name = principal.display_name
        if principal.kind == Kind.OWNER:
            return Holder(owner_sha256=self._owner_sha256, display_name=name)
        if principal.kind == Kind.API_KEY:
            return Holder(api_key_id=last_segment(principal.subject), display_name=name)
        if principal.kind == Kind.USER:
            return Holder(user_keys=[principal.subject.removeprefix(USERS)], display_name=name)
        raise PermissionDenied("services do not sign in", reason="SERVICE_HAS_NO_BROWSER")

    async def principal(self, conn: Connection, session: Session) -> Principal | None:
        """Returns whom a session stands for, with the roles of now; None if it counts no more."""
        holder = session.holder
        if holder.owner_sha256 is not None:
            if holder.owner_sha256 != self._owner_sha256:
                return None
            return replace(access.OWNER, expire_time=session.expire_time)
        if holder.api_key_id is not None:
            key = await access_store.get_api_key_by_id(conn, holder.api_key_id)
            if key is None:
                return None
            ends = [time for time in (session.expire_time, key.expire_time) if time]
            return replace(of_api_key(key), expire_time=min(ends))
        keys = holder.user_keys or ()
        return await _of_keys(conn, keys, holder.display_name, session.expire_time)

    async def _of_user(self, user: User) -> Principal:
        async with self._db.connection() as conn:
            return await _of_keys(conn, user.keys, user.display_name, user.expire_time)

    async def _find(self, conn: Connection, token: str, token_hash: bytes) -> Principal | None:
        if token.startswith(SESSION):
            session = await sessions.use_session(conn, token_hash)
            return None if session is None else await self.principal(conn, session)
        key = await access_store.use_api_key(conn, token_hash)
        return None if key is None else of_api_key(key)


def new_token(prefix: str) -> str:
    """Makes a token of 256 random bits: its kind and 43 characters."""
    return prefix + secrets.token_urlsafe(32)


def of_api_key(key: ApiKey) -> Principal:
    """Returns who calls with an API key."""
    return Principal(
        kind=Kind.API_KEY,
        subject=key.name,
        display_name=key.display_name,
        roles={key.project_id: key.role},
        expire_time=key.expire_time,
    )


async def _of_keys(
    conn: Connection, keys: Sequence[str], display_name: str, expire_time: datetime
) -> Principal:
    return Principal(
        kind=Kind.USER,
        subject=USERS + keys[0],
        display_name=display_name,
        roles=await access_store.list_roles(conn, keys),
        expire_time=expire_time,
    )
