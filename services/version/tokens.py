"""Whose a token is: the owner's, an API key, a session, or a JWT of the OIDC issuer."""

from __future__ import annotations

import secrets

from detflow import access
from detflow.access import Kind, Principal
from detflow.postgres import Connection, Database
from services.version import access_store
from services.version.access_store import ApiKey

API_KEY = "dfk_"


class Tokens:
    """Knows every token of the installation but the services' own.

    Args:
        db: Database of the version service.
        owner_token: The token that may do everything; "" if there is none.
    """

    def __init__(self, db: Database, owner_token: str) -> None:
        self._db = db
        self._owner_token = owner_token

    async def identify(self, token: str) -> Principal:
        """Returns whose a token is.

        Raises:
            Unauthenticated: BAD_TOKEN: it never counted, has ended or was deleted.
            Unavailable: The database is away.
        """
        token_hash = access.hash_token(token)
        if access.same_token(token_hash, self._owner_token):
            return access.OWNER
        async with self._db.connection() as conn:
            principal = await self._find(conn, token_hash)
        if principal is None:
            raise access.bad_token()
        return principal

    @staticmethod
    async def _find(conn: Connection, token_hash: bytes) -> Principal | None:
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
