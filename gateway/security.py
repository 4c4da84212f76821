"""What a browser must not be talked into: headers of every answer, and which pages may ask at all.

There is no CORS: other origins can neither read nor write. A gateway that listens on loopback only
answers to names of loopback, and one with a public URL to that name too, so that a web page cannot
reach it through a name of its own (DNS rebinding).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from detflow.access import is_loopback
from detflow.errors import InvalidArgument
from detflow.settings import Settings
from gateway.errors import HttpError

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HOST = r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?"
_AUTHORITY = re.compile(_HOST)
_PUBLIC_URL = re.compile(rf"(https?)://{_HOST}/?")
_PORTS = {"http": "80", "https": "443"}

BASE_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # Other origins see no address, of which one holds a ticket. With no-referrer the browsers that
    # do not send Sec-Fetch-Site would call our own forms cross-origin (Origin: null).
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Sent with every answer."""

HSTS = (b"strict-transport-security", b"max-age=31536000")
"""Sent too where browsers come over HTTPS: for a year they come in no other way."""

CLOSED_POLICY = b"default-src 'none'; frame-ancestors 'none'"
"""Content-Security-Policy of everything that is no page."""

SANDBOX_POLICY = (
    b"default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:;"
    b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
)
"""Content-Security-Policy of files that are shown: an origin of their own, no scripts, no loads."""


_UNCHECKED_PATHS = ("/healthz", "/readyz")
"""Probes of orchestrators come by the address of the machine; these paths hold nothing."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where browsers reach the gateway.

    Attributes:
        loopback: Whether it listens on loopback only.
        public: Origin of its public URL, such as https://detflow.example.com; empty without one.
        is_secure: Whether browsers come over HTTPS.
    """

    loopback: bool
    public: str = ""
    is_secure: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Reads the settings.

        Raises:
            InvalidArgument: BAD_SETTING, the public URL is none.
        """
        public = _origin(settings.public_url)
        return cls(
            loopback=is_loopback(settings.http_listen.rpartition(":")[0]),
            public=public,
            is_secure=bool(settings.tls_cert_file) or public.startswith("https:"),
        )


def _origin(url: str) -> str:
    """Returns the origin of a public URL, as browsers write it: without the port of its scheme."""
    if not url:
        return ""
    match = _PUBLIC_URL.fullmatch(url.lower())
    if match is None or (match[1] == "http" and not is_loopback(match[2])):
        raise InvalidArgument(
            f"DETFLOW_PUBLIC_URL must be https://HOST or https://HOST:PORT, not {url!r}",
            reason="BAD_SETTING",
        )
    scheme, host, port = match.groups()
    is_default = port in (None, _PORTS[scheme])
    return f"{scheme}://{host}" if is_default else f"{scheme}://{host}:{port}"


def page_policy(style: str, *, forms: bool = False) -> str:
    """Content-Security-Policy of a page whose only resource is one inline style sheet.

    Args:
        style: The style sheet.
        forms: Whether it may send forms to this gateway.
    """
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    target = "'self'" if forms else "'none'"
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action {target}; "
        "frame-ancestors 'none'"
    )


def check_host(headers: Mapping[bytes, bytes], address: Address, path: str = "") -> None:
    """Checks the Host header.

    Raises:
        HttpError: 400 if it is malformed, 421 if the gateway does not answer to this name.
    """
    text = headers.get(b"host", b"").decode("latin-1").lower()
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise HttpError(
            400, "INVALID_ARGUMENT", "the Host header must be a name or address", reason="BAD_HOST"
        )
    if not (address.loopback or address.public) or path in _UNCHECKED_PATHS:
        return
    name = match[1].rstrip(".")
    if name.endswith(".localhost") or is_loopback(name):
        return
    if address.public and text in _hosts(address.public):
        return
    known = f"{address.public} and localhost" if address.public else "localhost"
    raise HttpError(
        421,
        "PERMISSION_DENIED",
        f"this gateway answers to {known} only; to serve another name, set DETFLOW_PUBLIC_URL to"
        " it, or let the proxy send Host: localhost",
        reason="HOST_NOT_ALLOWED",
    )


def _hosts(origin: str) -> tuple[str, str]:
    """How a Host header may write an origin: with and without the port of its scheme."""
    scheme, _, authority = origin.partition("://")
    return authority, f"{authority}:{_PORTS[scheme]}"


def check_origin(
    method: str, headers: Mapping[bytes, bytes], address: Address, *, has_cookie: bool = False
) -> None:
    """Refuses writes that a page of another origin sends.

    Browsers say where a request comes from in Sec-Fetch-Site, older ones in Origin; programs send
    neither, and no cookie. A cookie alone proves nothing: what comes with one, and does not say
    where it comes from, is refused.

    Args:
        method: HTTP method.
        headers: Headers of the request.
        address: Where browsers reach the gateway.
        has_cookie: Whether a cookie says who asks.

    Raises:
        HttpError: 403.
    """
    if method in _SAFE_METHODS:
        return
    site = headers.get(b"sec-fetch-site")
    origin = headers.get(b"origin")
    if site is not None:
        allowed = site in (b"same-origin", b"none")
    elif origin is not None:
        allowed = _is_own(origin.decode("latin-1").lower(), headers, address)
    else:
        allowed = not has_cookie
    if not allowed:
        raise HttpError(
            403,
            "PERMISSION_DENIED",
            "pages of another origin cannot change anything here; a program that sends a cookie"
            " says by the header Origin that it is none",
            reason="CROSS_ORIGIN",
        )


def _is_own(origin: str, headers: Mapping[bytes, bytes], address: Address) -> bool:
    if address.public and origin == address.public:
        return True
    scheme, _, authority = origin.partition("://")
    host = headers.get(b"host", b"").decode("latin-1").lower()
    # Before a proxy with TLS the gateway does not know the scheme.
    return authority == host and (scheme == "https" or not address.is_secure)
