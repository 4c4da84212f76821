"""ID tokens of the OIDC issuer: whether one is genuine and for this installation, and whose."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import jwt
import orjson
from jwt.exceptions import PyJWKError

from detflow import access, telemetry
from detflow.errors import Unavailable
from detflow.settings import Settings
from services.version.access_store import user_key

log = telemetry.get_logger(__name__)

ALGORITHMS: Final = ("RS256", "ES256", "EdDSA")
"""Those with a public key; never what a token itself asks for."""
LEEWAY: Final = timedelta(seconds=60)
_DISCOVERY = "/.well-known/openid-configuration"
_KEYS_SECONDS = 3600.0
_REFRESH_SECONDS = 10.0  # between two looks for a key that was not there
_MAX_BYTES = 256 << 10
_TIMEOUT = aiohttp.ClientTimeout(total=5)
_MAX_NAME = 200
_MAX_KEY = 254


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    """A person whom the issuer vouches for.

    Attributes:
        keys: By which the person may be a member: a verified e-mail address, the subject.
        display_name: Name shown to people.
        expire_time: When the ID token ends.
    """

    keys: tuple[str, ...]
    display_name: str
    expire_time: datetime


class Issuer:
    """Verifies the ID tokens of one issuer; `await close()` when done.

    Args:
        url: The issuer, as it is in its tokens.
        client_id: What this installation is called there.
    """

    def __init__(self, url: str, client_id: str) -> None:
        self._url = url
        self._client_id = client_id
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._keys_time = -_KEYS_SECONDS
        self._tried_time = -_REFRESH_SECONDS
        self._refreshing = asyncio.Lock()
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes the connections."""
        if self._http is not None:
            await self._http.close()

    async def verify(self, token: str, nonce: str | None = None) -> User:
        """Returns whom an ID token stands for.

        Args:
            token: The JWT.
            nonce: What it must hold as nonce; None: whatever it holds.

        Raises:
            Unauthenticated: BAD_TOKEN.
            Unavailable: ISSUER_AWAY: its keys cannot be fetched.
        """
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in ALGORITHMS or "crit" in header:
                raise access.bad_token()
            key = await self._find_key(header.get("kid"))
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=self._client_id,
                issuer=self._url,
                leeway=LEEWAY,
                options={
                    "require": ["exp", "iat", "iss", "aud", "sub"],
                    "enforce_minimum_key_length": True,
                },
            )
        except jwt.PyJWTError as error:
            log.info("ID token refused", error=type(error).__name__)
            raise access.bad_token() from error
        if claims.get("azp", self._client_id) != self._client_id:
            raise access.bad_token()
        given = claims.get("nonce")
        if nonce is not None and not (
            isinstance(given, str) and hmac.compare_digest(given.encode(), nonce.encode())
        ):
            raise access.bad_token()
        return _user(claims)

    async def _find_key(self, kid: str | None) -> jwt.PyJWK:
        """Returns the key of this id; of a token that names none, the only one there is."""
        if time.monotonic() - self._keys_time > _KEYS_SECONDS:
            await self._refresh()
        if (key := self._get_key(kid)) is None:
            await self._refresh()
            key = self._get_key(kid)
        if key is None:
            raise access.bad_token()
        return key

    def _get_key(self, kid: str | None) -> jwt.PyJWK | None:
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid or "")

    async def _refresh(self) -> None:
        """Fetches the keys, unless that was tried a moment ago."""
        async with self._refreshing:
            if time.monotonic() - self._tried_time < _REFRESH_SECONDS:
                if not self._keys:
                    raise _away()
                return
            self._tried_time = time.monotonic()
            try:
                self._keys = await self._fetch_keys()
                self._keys_time = time.monotonic()
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                log.warning("OIDC issuer is away", issuer=self._url, error=repr(error))
                if not self._keys:
                    raise _away() from error

    async def _fetch_keys(self) -> Mapping[str, jwt.PyJWK]:
        discovered = await self._fetch(self._url.rstrip("/") + _DISCOVERY)
        if discovered.get("issuer") != self._url:
            raise ValueError(f"the issuer calls itself {discovered.get('issuer')!r}")
        url = discovered.get("jwks_uri")
        if not isinstance(url, str) or urlsplit(url).scheme != urlsplit(self._url).scheme:
            raise ValueError(f"jwks_uri is {url!r}")
        keys: dict[str, jwt.PyJWK] = {}
        listed = (await self._fetch(url)).get("keys")
        for one in listed if isinstance(listed, list) else []:
            if not isinstance(one, dict):
                continue
            try:
                key = jwt.PyJWK(one)
            except (jwt.InvalidKeyError, PyJWKError):
                continue  # of a kind that is not used here
            if key.algorithm_name in ALGORITHMS and one.get("use", "sig") == "sig":
                keys[key.key_id or ""] = key
        return keys

    async def _fetch(self, url: str) -> dict[str, Any]:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=_TIMEOUT)
        async with self._http.get(url, allow_redirects=False) as answer:
            answer.raise_for_status()
            if answer.status != 200:
                raise ValueError(f"{url} answers {answer.status}")
            try:
                data = await answer.content.readexactly(_MAX_BYTES)
            except asyncio.IncompleteReadError as error:
                data = error.partial
            else:
                raise ValueError(f"{url} has more than {_MAX_BYTES} bytes")
        found = orjson.loads(data)
        if not isinstance(found, dict):
            raise ValueError(f"{url} is no JSON object")
        return found


def make_issuer(settings: Settings) -> Issuer | None:
    """Makes the issuer that the settings name, if they name one.

    Raises:
        InvalidArgument: MISSING_SETTING or BAD_SETTING.
    """
    if not settings.oidc_issuer:
        return None
    access.check_issuer(settings)
    return Issuer(settings.oidc_issuer, settings.oidc_client_id)


def _user(claims: Mapping[str, Any]) -> User:
    email, subject = claims.get("email"), claims["sub"]
    keys = []
    if isinstance(email, str) and "@" in email and claims.get("email_verified") is True:
        keys.append(user_key(email))
    # A subject that looks like an address would pass for one that was verified.
    if isinstance(subject, str) and "@" not in subject:
        keys.append(user_key(subject))
    keys = [key for key in keys if key and key.isprintable() and len(key) <= _MAX_KEY]
    if not keys:
        log.info("ID token refused", error="neither a verified e-mail address nor a plain subject")
        raise access.bad_token()
    name = claims.get("name")
    name = name if isinstance(name, str) and name.isprintable() and name.strip() else keys[0]
    return User(
        keys=tuple(keys),
        display_name=name[:_MAX_NAME],
        expire_time=datetime.fromtimestamp(int(claims["exp"]), UTC) + LEEWAY,
    )


def _away() -> Unavailable:
    return Unavailable(
        "the OIDC issuer cannot be asked for the moment; retry", reason="ISSUER_AWAY"
    )
