"""Signing in with the OIDC issuer: authorization code flow with PKCE (RFC 6749, RFC 7636, OIDC).

The gateway keeps nothing meanwhile. One random secret in a cookie of the browser is what state,
nonce and PKCE's verifier are made of, so that an answer counts only in the browser that asked, and
at any replica. Whether the ID token is genuine is judged by the version service.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
import orjson

from detflow import access, telemetry
from detflow.settings import Settings

log = telemetry.get_logger(__name__)

COOKIE_SECONDS = 600
"""How long somebody may take at the issuer."""

_DISCOVERY = "/.well-known/openid-configuration"
_DISCOVERY_SECONDS = 3600.0
_RETRY_SECONDS = 2.0
_MAX_BYTES = 256 << 10
_TIMEOUT = aiohttp.ClientTimeout(total=10)
_SCOPE = "openid email profile"
_MAX_TOKEN_LENGTH = 8192
_ERROR = re.compile(r"[a-z_]{1,40}")


class OidcError(Exception):
    """Signing in with the issuer failed.

    Args:
        cause: For the log.
        is_refusal: Whether the issuer, or the person there, said no; otherwise it is out of order.
    """

    def __init__(self, cause: str, *, is_refusal: bool = False) -> None:
        super().__init__(cause)
        self.is_refusal = is_refusal


@dataclass(frozen=True, slots=True)
class _Endpoints:
    authorization: str
    token: str
    uses_post: bool  # of the client's secret


class Issuer:
    """The issuer whose people may sign in; close with `await close()`.

    Args:
        settings: With its URL, and what this installation is there.

    Raises:
        InvalidArgument: MISSING_SETTING or BAD_SETTING.
    """

    def __init__(self, settings: Settings) -> None:
        access.check_issuer(settings)
        self._url = settings.oidc_issuer.rstrip("/")
        self._issuer = settings.oidc_issuer
        self._client_id = settings.oidc_client_id
        self._client_secret = settings.oidc_client_secret
        self._endpoints: _Endpoints | None = None
        self._endpoints_time = 0.0
        self._failure_time = float("-inf")
        self._discovering = asyncio.Lock()
        self._http: aiohttp.ClientSession | None = None
        self.name = urlsplit(settings.oidc_issuer).netloc
        """Shown to who signs in."""

    async def close(self) -> None:
        """Closes the connections."""
        if self._http is not None:
            await self._http.close()

    async def begin(self, redirect_uri: str) -> tuple[str, str]:
        """Returns where to send the browser, and the secret that it keeps meanwhile.

        Raises:
            OidcError: The issuer does not answer, or not as it should.
        """
        endpoints = await self._discover()
        secret = secrets.token_urlsafe(32)
        query = urlencode(
            {
                "response_type": "code",
                "client_id": self._client_id,
                "redirect_uri": redirect_uri,
                "scope": _SCOPE,
                "state": _derive(secret, "state"),
                "nonce": nonce_of(secret),
                "code_challenge": _hash(_derive(secret, "verifier").encode()),
                "code_challenge_method": "S256",
            }
        )
        url = endpoints.authorization
        return f"{url}{'&' if urlsplit(url).query else '?'}{query}", secret

    async def finish(self, secret: str, query: Mapping[str, str], redirect_uri: str) -> str:
        """Returns the ID token that the issuer gives for what the browser brought back.

        Args:
            secret: What the browser kept; "" if nothing.
            query: Of the address the browser was sent to.
            redirect_uri: As it was at the beginning.

        Raises:
            OidcError: It gives none, or this browser did not ask for it.
        """
        state = query.get("state", "")
        if not (secret and hmac.compare_digest(state.encode(), _derive(secret, "state").encode())):
            raise OidcError("the answer belongs to no sign-in of this browser", is_refusal=True)
        if query.get("iss", self._issuer) != self._issuer:  # RFC 9207
            raise OidcError("the answer comes from another issuer", is_refusal=True)
        if "code" not in query:
            raise OidcError(f"the issuer said {_known(query.get('error'))}", is_refusal=True)
        endpoints = await self._discover()
        form = {
            "grant_type": "authorization_code",
            "code": query["code"],
            "redirect_uri": redirect_uri,
            "client_id": self._client_id,
            "code_verifier": _derive(secret, "verifier"),
        }
        headers = {"accept": "application/json"}
        if self._client_secret and endpoints.uses_post:
            form["client_secret"] = self._client_secret
        elif self._client_secret:
            pair = f"{quote(self._client_id, safe='')}:{quote(self._client_secret, safe='')}"
            headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        status, answer = await self._ask("POST", endpoints.token, headers=headers, data=form)
        token = answer.get("id_token")
        if status != 200 or not isinstance(token, str) or not 0 < len(token) <= _MAX_TOKEN_LENGTH:
            raise OidcError(
                f"the token endpoint answered {status} {_known(answer.get('error'))}, no ID token",
                is_refusal=status == 400,
            )
        return token

    async def _discover(self) -> _Endpoints:
        """Returns where to ask; whoever comes meanwhile, or after a failure, asks for no other."""
        async with self._discovering:
            now = time.monotonic()
            if self._endpoints and now < self._endpoints_time + _DISCOVERY_SECONDS:
                return self._endpoints
            if now < self._failure_time + _RETRY_SECONDS:
                raise OidcError("discovery failed a moment ago")
            try:
                self._endpoints = await self._fetch_endpoints()
            except OidcError:
                self._failure_time = time.monotonic()
                raise
            self._endpoints_time = now
            return self._endpoints

    async def _fetch_endpoints(self) -> _Endpoints:
        status, document = await self._ask("GET", f"{self._url}{_DISCOVERY}")
        if status != 200 or document.get("issuer") != self._issuer:
            raise OidcError(
                f"discovery answered {status}, of the issuer {document.get('issuer')!r} instead of"
                f" {self._issuer!r}"
            )
        methods = document.get("token_endpoint_auth_methods_supported")
        methods = methods if isinstance(methods, list) else ["client_secret_basic"]
        return _Endpoints(
            authorization=_endpoint(document.get("authorization_endpoint")),
            token=_endpoint(document.get("token_endpoint")),
            uses_post="client_secret_post" in methods and "client_secret_basic" not in methods,
        )

    async def _ask(self, method: str, url: str, **request: Any) -> tuple[int, dict[str, Any]]:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                timeout=_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar()
            )
        try:
            async with self._http.request(
                method, url, allow_redirects=False, **request
            ) as response:
                body = bytearray()
                async for chunk in response.content.iter_chunked(1 << 16):
                    body += chunk
                    if len(body) > _MAX_BYTES:
                        raise OidcError(f"the issuer's answer has more than {_MAX_BYTES} bytes")
                value = orjson.loads(body)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise OidcError(f"the issuer does not answer as it should: {error!r}") from error
        return response.status, value if isinstance(value, dict) else {}


def _endpoint(url: Any) -> str:
    if not isinstance(url, str) or not access.is_trusted(url):
        raise OidcError(f"discovery names {url!r}, which is no https:// address")
    return url


def nonce_of(secret: str) -> str:
    """Returns what the ID token must hold."""
    return _derive(secret, "nonce")


def _derive(secret: str, purpose: str) -> str:
    return _hash(f"{purpose}:{secret}".encode())


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _known(error: Any) -> str:
    """What an issuer says, if it is a code of the standard: all else may be anything."""
    return error if isinstance(error, str) and _ERROR.fullmatch(error) else "nothing known"
